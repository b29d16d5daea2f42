"""What the batch script does: rendezvous, check of the nodes, the ranks, and what follows from how they ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import REQUEUE, USER_ERROR
from pretrain.launch import container, deepspeed, shell, torchrun
from pretrain.launch.job import Job
from pretrain.launch.shell import Shell

if TYPE_CHECKING:
    from pretrain.launch.slurm import Slurm

CHECK_MIN, COMMAND_S, LAST_S, YOUNG_S = 15, 600, 60, 3
"""Minutes that the check of all nodes may take; seconds that a site's command may take on one; that ranks may go on
when one has ended; in which a step may not be reached by signals yet, and has done nothing worth saving."""

_RENDEZVOUS = """\
# The ranks meet on the first node, at a port that follows from the job and that nobody holds.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
attempt=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID, attempt $attempt, on $SLURM_JOB_NODELIST, meets at $MASTER_ADDR:$MASTER_PORT, $(date -Is)"
"""

_STOP = """\
# Before the time limit (USR2, to this shell alone) and at a preemption (TERM) every rank is asked to save and stop.
stopped=
stop() {
  stopped=yes
  scancel --signal=TERM "$job"
  [ "$SECONDS" -ge "$young" ] || kill "$step" 2>/dev/null  # what has only just begun may not be reached yet
}
young=0
trap stop USR2 TERM
stops() { cat "$run/events.jsonl" 2>/dev/null | grep -c '"event": "stopped"'; }
await() {  # how the step in the background ends; a signal to this shell ends `wait` early
  step=$!
  young=$((SECONDS + {young}))
  [ -z "$stopped" ] || kill "$step"
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
}
"""

_REQUEUE = """\
requeue() {
  echo "requeued: $1"
  trap '' TERM  # SLURM ends this shell now; what is left out can be changed once the job waits again
  scontrol requeue "$job" || exit 1
  bad=$(cd "$bad_nodes" && printf '%s\\n' * | sort | paste -sd, -)
  [ "$bad" != '*' ] || exit 0
  echo "left out from now on: $bad"
  for _ in 1 2 3 4 5 6 7 8; do
    scontrol update "JobId=$job" "ExcNodeList=${exclude:+$exclude,}$bad" && break
    sleep 0.5
  done
  exit 0
}
"""

_END = """\
end() {
  case $1 in
    0) exit 0 ;;
    {user_error}) echo "a mistake that starting again would repeat: not requeued"; exit "$1" ;;
  esac
  case $(scontrol show job --oneliner "$job") in
    *JobState=RUNNING*) ;;
    *) echo "SLURM is ending this job itself (scancel, time limit, preemption): left to it"; exit "$1" ;;
  esac
  if [ "$1" = {requeue} ] || [ "$stopped" ] || [ "$(stops)" != "$stops_before" ]; then
    requeue "it was asked to stop"
  fi
  failures=$(($(cat "$counted" 2>/dev/null || echo 0) + 1))
  echo "$failures" > "$counted"
  if [ "$failures" -le {max_restarts} ]; then
    requeue "exit code $1, failure $failures; {max_restarts} are forgiven"
  fi
  echo "exit code $1, failure $failures; {max_restarts} are forgiven: not requeued"
  exit "$1"
}
"""

_CHECKED = """\
await || {
  code=$?
  [ -z "$stopped" ] || end {requeue}
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ ! -e "$bad_nodes/$node" ] || end 1  # this node is at fault, not the config
  done
  end "$code"
}
[ -z "$stopped" ] || end {requeue}
"""


def body(options: Slurm, job: Job, folder: Path) -> list[str]:
    """Everything below the directives."""
    return [
        "# Written by `pretrain launch slurm`; code and config are frozen beside it.",
        *_variables(options, job, folder),
        "",
        *options.setup,
        _RENDEZVOUS,
        _filled(_STOP, options),
        _REQUEUE,
        _filled(_END, options),
        "stops_before=$(stops)",
        *_check(options, job),
        *_ranks(options, job),
        "await",
        "end $?",
    ]


def _filled(text: str, options: Slurm) -> str:
    facts = {"requeue": REQUEUE, "user_error": USER_ERROR, "max_restarts": options.max_restarts, "young": YOUNG_S}
    for name, value in facts.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def bad_folder(job: Job) -> Path:
    """Whoever finds a node bad makes a file of its name here."""
    return job.run_folder / "launch" / "bad_nodes"


def _variables(options: Slurm, job: Job, folder: Path) -> list[str]:
    """The run's own: variables of the shell that submitted the job must not decide who a rank is."""
    run = shlex.quote(str(job.run_folder)) + ('"-seed$SLURM_ARRAY_TASK_ID"' if options.seeds else "")
    # In an array the number of one task is the number of the whole array too, and would requeue all of it.
    path = ":".join(str(part) for part in (job.code, job.work_folder) if part)
    return [
        f"run={run}",
        f"job={'${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID' if options.seeds else '$SLURM_JOB_ID'}",
        f"export bad_nodes={shlex.quote(str(bad_folder(job)))}",
        f"exclude={shlex.quote(','.join(options.exclude))}",
        f'counted={shlex.quote(str(folder))}"/failures-$SLURM_JOB_ID"',
        'mkdir -p "$bad_nodes"',
        "unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1  # the folder of the job hides no frozen code",
        f"export PYTHONPATH={shlex.quote(path)}",
        *(f"export {name}={shlex.quote(value)}" for name, _, value in (i.partition("=") for i in options.environment)),
    ]


def _check(options: Slurm, job: Job) -> list[str]:
    """The step before the run: `pretrain doctor` on all ranks, or a command of the site's once a node, or nothing."""
    if options.preflight == "none":
        return []
    every = _every_rank(options) if options.preflight == "doctor" else _every_node(options)
    step = ["srun", "--kill-on-bad-exit=0", f"--time={CHECK_MIN}", *every]
    parts = [step, container.of_step(options, job), container.of_task(options, job)]
    return [
        "# First the nodes are checked. One that is itself at fault is named, and left out when the job comes back.",
        shell.command(*parts, *_checking(options, job), after=" &"),
        _filled(_CHECKED, options),
    ]


def _every_rank(options: Slurm) -> list[str]:
    """Tasks placed as the ranks will be, also where an agent a node is to start those."""
    if options.form == "srun":
        return [f"--wait={LAST_S}", *_cores(options)]
    cores = [f"--cpus-per-task={options.cpus_per_rank}"] if options.cpus_per_rank else ["--overcommit"]
    return [f"--ntasks={options.world_size}", f"--ntasks-per-node={options.ranks}", f"--wait={LAST_S}", *cores]


def _every_node(options: Slurm) -> list[str]:
    return [f"--nodes={options.nodes}", f"--ntasks={options.nodes}", "--ntasks-per-node=1"]


def _checking(options: Slurm, job: Job) -> list[Sequence[str]]:
    if options.preflight == "doctor":
        doctor = [options.python, "-m", "pretrain", "doctor", str(job.config), *_seed(options)]
        return [[*doctor, "--bad-nodes", Shell('"$bad_nodes"')]]
    failed = '{ touch "$bad_nodes/$SLURMD_NODENAME"; exit 1; }'
    return [["bash", "-c", f'timeout {COMMAND_S} bash -c "$0" || {failed}'], [options.preflight]]


def _cores(options: Slurm) -> list[str]:
    """What srun does not inherit from the job."""
    return [Shell('--cpus-per-task="$SLURM_CPUS_PER_TASK"')] if options.cpus_per_rank else []


def _ranks(options: Slurm, job: Job) -> list[str]:
    """The step that is the run. A rank that dies ends the others after a minute, a rank that stops leaves them time."""
    step = [["srun", "--kill-on-bad-exit=0", f"--wait={LAST_S}", *_cores(options)], container.of_step(options, job)]
    task, seed = container.of_task(options, job), _seed(options)
    if options.form == "srun":
        return [shell.command(*step, task, [options.python, "-m", *job.words], seed, after=" &")]
    if options.form == "torchrun":
        meeting = torchrun.rendezvous(Shell('"$MASTER_ADDR:$MASTER_PORT"'), Shell('"$SLURM_JOB_ID.$attempt"'))
        (first, *others) = torchrun.agent(options, meeting)
        return [
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={options.grace_s}  # for saving, before the agent kills",
            shell.command(*step, task, [options.python, *first], *others, job.words, seed, after=" &"),
        ]
    where = ["--master_addr", Shell('"$MASTER_ADDR"'), "--master_port", Shell('"$MASTER_PORT"')]
    where += ["--node_rank", Shell('"$SLURM_NODEID"'), "--no_ssh"]
    (first, *others) = deepspeed.runner(Shell('"$hosts"'), where)
    return _deepspeed(options, job, step, [task, [options.python, *first], *others, job.words, seed])


def _deepspeed(options: Slurm, job: Job, step: list[list[str]], agent: list[Sequence[str]]) -> list[str]:
    """DeepSpeed's launcher ends at once when it is told to stop; `cat` stays until the last rank closes its output."""
    inside = f'set -o pipefail; trap "" TERM\n{shell.command(*agent)} 2>&1 | cat'
    return [
        f'export run hosts={shlex.quote(str(deepspeed.hostfile_path(job)))}"-$SLURM_JOB_ID"',
        f'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots={options.ranks}/" > "$hosts"',
        shell.command(*step, ["bash", "-c", inside], after=" &"),
    ]


def _seed(options: Slurm) -> list[str]:
    """Each run of an array has its own seed and folder."""
    name = Shell('"$(basename "$run")"')
    return ["--seed", Shell('"$SLURM_ARRAY_TASK_ID"'), "--name", name] if options.seeds else []

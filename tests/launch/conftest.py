"""A real SLURM of two nodes on this machine, and what a test does to its jobs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain import flags
from pretrain.launch import asked, slurm, snapshot
from pretrain.launch.job import Job

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "slurm_local.sh"
WAIT_S = 300

STUB = """#!/bin/bash
# Stands in for the interpreter: what the doctor does is in DOCTOR, what the run does is in STUB.
do=${STUB:-0}
case "$*" in *" doctor "*) do=${DOCTOR:-0} ;; esac
echo "$3 on $SLURMD_NODENAME, attempt ${SLURM_RESTART_COUNT:-0}, meets at $MASTER_PORT"
case $do in
  wait) trap 'exit 85' TERM; echo "$3 waits"; while :; do sleep 0.1; done ;;  # as a run that saves when it is asked to
  n?) [ ! -d "${!#}" ] || [ "$SLURMD_NODENAME" != "$do" ] || touch "${!#}/$do"; sleep 1; exit 2 ;;
  *) exit "$do" ;;
esac
"""


@dataclass(frozen=True)
class Sent:
    """A job as `pretrain launch slurm --json` tells of it."""

    cluster: Cluster
    job: str
    run: Path
    script: Path
    log: str

    def said(self) -> str:
        """All that the job has written; an array's tasks one after the other."""
        path = Path(self.log)
        return "".join(file.read_text() for file in sorted(path.parent.glob(path.name)))

    def state(self) -> str:
        """STATE and reason; a job that waits to be started again is REQUEUED, before its first start it is PENDING."""
        shown = self.cluster.tell("scontrol", "show", "job", self.job, "--oneliner")
        found = " ".join(re.findall(r"(?:JobState|Reason)=(\S+)", shown)[:2])
        return found if "Restarts=0" in shown else found.replace("PENDING", "REQUEUED")

    def until(self, *states: str) -> str:
        """Wait until the job is in one of these states."""
        return self.cluster.until(
            lambda: found if (found := self.state()).split()[0] in states else "", f"job {self.job} is {states}", self
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of RUN/events.jsonl."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def until_step(self, step: int, starts: int = 1) -> None:
        """Wait until the run, started so many times, has done a step."""

        def there() -> bool:
            path = self.run / "metrics.jsonl"
            done = path.read_text().split("\n")[:-1] if path.exists() else []
            assert not self.state().startswith("FAILED"), self.said()
            return len(self.events("start")) >= starts and bool(done) and json.loads(done[-1])["step"] >= step

        self.cluster.until(there, f"step {step} of start {starts}", self)

    def go_on(self) -> None:
        """A requeued job waits two minutes; spare them."""
        self.until("REQUEUED")
        time.sleep(2)  # SLURM refuses the credential of a job that starts again in the second in which it ended
        self.until_started()

    def until_started(self) -> None:
        """Wait until the job has started again, as soon as SLURM lets it."""

        def started() -> bool:
            self.cluster.tell("scontrol", "update", f"JobId={self.job}", "StartTime=now", check=False)
            return self.state().startswith(("RUNNING", "COMPLETED", "FAILED"))

        self.cluster.until(started, "the job starts again", self)


class Cluster:
    """Two nodes, n1 and n2, and n3 beside them; everything of theirs ends with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | variables
        self.tell(str(SCRIPT), "up", str(folder), str(random.SystemRandom().randrange(11_000, 29_000)))

    def tell(self, *command: str, check: bool = True, **variables: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment | variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if not check else "")

    def launch(self, runs: Path, *flags: object, checkout: Path = ROOT, **variables: str) -> Sent:
        """Submit configs/debug.yaml of a checkout."""
        config = str(checkout / "configs" / "debug.yaml")
        command = [sys.executable, "-m", "pretrain", "launch", "slurm", config, "--folder", str(runs), "--json"]
        paths = {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        facts = json.loads(self.tell(*command, *map(str, flags), **paths, **variables))
        return Sent(self, facts["job"], Path(facts["run"]), Path(facts["script"]), facts["log"])

    def sent(self, job: str, run: Path) -> Sent:
        """A job of a run's first submission."""
        folder = run / "launch" / "0001"
        return Sent(self, job, run, folder / snapshot.SCRIPT, f"{folder}/log-{job}.txt")

    def stub(self, runs: Path, *options: object, **variables: str) -> Sent:
        """Submit the script of a run whose interpreter is `STUB`; no config is checked, no code is frozen."""
        python = runs / "python"
        runs.mkdir(exist_ok=True)
        python.write_text(STUB)
        python.chmod(0o755)
        want = asked.parse(["CONFIG", "--cluster", "cpu", "--python", str(python), *map(str, options)], slurm.Slurm)
        own = flags.parse(slurm.Slurm, want.own, "test", slurm.Slurm())
        folder = snapshot.next_folder(runs / "stub")
        folder.mkdir(parents=True)
        job = Job(name=runs.name, run_folder=runs / "stub", work_folder=runs, config=folder / snapshot.CONFIG)
        script = folder / snapshot.SCRIPT
        script.write_text(slurm.render(own, job, folder))
        number = self.tell("sbatch", "--parsable", str(script), **variables).strip()
        return Sent(self, number, job.run_folder, script, slurm.log_of(own, folder, number))

    def preempt(self) -> None:
        """A job that outranks all others takes both nodes for a moment."""
        self.tell("sbatch", "-p", "urgent", "--exclusive", "--nodes=2", "-o", "/dev/null", "--wrap", "sleep 1")

    def lose(self, node: str) -> None:
        """Every process of a node is gone at once: those in its namespace of host names."""
        daemon = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        space = os.readlink(f"/proc/{daemon}/ns/uts")
        for path in Path("/proc").glob("[0-9]*/ns/uts"):
            try:
                if os.readlink(path) == space:
                    os.kill(int(path.parts[2]), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended by itself meanwhile

    def repair(self, node: str) -> None:
        """The node comes back."""
        self.tell(str(SCRIPT), "node", str(self.folder), node)

    def until(self, holds: Callable[[], Any], what: str, job: Sent) -> Any:
        """Wait until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not (found := holds()):
            assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}; {job.state()}\n{job.said()}"
            time.sleep(0.2)
        return found

    def close(self) -> None:
        self.tell(str(SCRIPT), "down", str(self.folder))


def missing() -> str:
    """Why no SLURM can be started here; '' where it can."""
    for name in ("slurmctld", "slurmd", "munged", "unshare", "sbatch"):
        if shutil.which(name) is None:
            return f"{name} is not installed: apt-get install slurm-wlm munge"
    if os.getuid() != 0:
        return "only root can start the daemons of SLURM"
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True)
    return "" if tried.returncode == 0 else "namespaces are not allowed here"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    yield found
    found.close()

#!/bin/bash
#SBATCH --job-name="it's "'"'"b"'"'" #1"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclude="n[1-3]"
#SBATCH --chdir="/w d"
#SBATCH --output="/r/it's $x/launch/0001/log-%j.txt"
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
#SBATCH --requeue

# Written by `pretrain launch slurm`; code and config are frozen beside it.
run='/r/it'"'"'s $x'
job=$SLURM_JOB_ID
export bad_nodes='/r/it'"'"'s $x/launch/bad_nodes'
exclude='n[1-3]'
counted='/r/it'"'"'s $x/launch/0001'"/failures-$SLURM_JOB_ID"
mkdir -p "$bad_nodes"
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1  # the folder of the job hides no frozen code
export PYTHONPATH='/w d'
export A='it'"'"'s "x"'

# The ranks meet on the first node, at a port that follows from the job and that nobody holds.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
attempt=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID, attempt $attempt, on $SLURM_JOB_NODELIST, meets at $MASTER_ADDR:$MASTER_PORT, $(date -Is)"

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
  young=$((SECONDS + 3))
  [ -z "$stopped" ] || kill "$step"
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
}

requeue() {
  echo "requeued: $1"
  trap '' TERM  # SLURM ends this shell now; what is left out can be changed once the job waits again
  scontrol requeue "$job" || exit 1
  bad=$(cd "$bad_nodes" && printf '%s\n' * | sort | paste -sd, -)
  [ "$bad" != '*' ] || exit 0
  echo "left out from now on: $bad"
  for _ in 1 2 3 4 5 6 7 8; do
    scontrol update "JobId=$job" "ExcNodeList=${exclude:+$exclude,}$bad" && break
    sleep 0.5
  done
  exit 0
}

end() {
  case $1 in
    0) exit 0 ;;
    2) echo "a mistake that starting again would repeat: not requeued"; exit "$1" ;;
  esac
  case $(scontrol show job --oneliner "$job") in
    *JobState=RUNNING*) ;;
    *) echo "SLURM is ending this job itself (scancel, time limit, preemption): left to it"; exit "$1" ;;
  esac
  if [ "$1" = 85 ] || [ "$stopped" ] || [ "$(stops)" != "$stops_before" ]; then
    requeue "it was asked to stop"
  fi
  failures=$(($(cat "$counted" 2>/dev/null || echo 0) + 1))
  echo "$failures" > "$counted"
  if [ "$failures" -le 3 ]; then
    requeue "exit code $1, failure $failures; 3 are forgiven"
  fi
  echo "exit code $1, failure $failures; 3 are forgiven: not requeued"
  exit "$1"
}

stops_before=$(stops)
# First the nodes are checked. One that is itself at fault is named, and left out when the job comes back.
srun --kill-on-bad-exit=0 --time=15 --nodes=1 --ntasks=1 --ntasks-per-node=1 \
  bash -c 'timeout 600 bash -c "$0" || { touch "$bad_nodes/$SLURMD_NODENAME"; exit 1; }' \
  'a '"'"'b'"'"' || c' &
await || {
  code=$?
  [ -z "$stopped" ] || end 85
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ ! -e "$bad_nodes/$node" ] || end 1  # this node is at fault, not the config
  done
  end "$code"
}
[ -z "$stopped" ] || end 85

srun --kill-on-bad-exit=0 --wait=60 \
  /env/bin/python -m pretrain train '/r/it'"'"'s $x/launch/0001/config.yaml' &
await
end $?

#!/bin/bash
# A real SLURM on loopback, from Debian packages, without systemd. Root needed (unshare, setuid).
# Two nodes for jobs, n1 and n2, which the partition `urgent` preempts, and n3 in `aside` for a job that nobody shall disturb.
#   slurm_local.sh up DIR PORT   start munged + slurmctld + 3 slurmd (own hostnames, 2 fake GPUs each) on PORT..PORT+99
#   slurm_local.sh node DIR n2   start a slurmd that was killed
#   slurm_local.sh down DIR      stop exactly those daemons, by their pid files
# then: export SLURM_CONF=DIR/slurm.conf; sinfo; srun -N2 hostname
# packages: apt-get install -y --no-install-recommends slurm-wlm munge
set -eu
cmd=$1
D=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$D/slurm.conf
alive() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
down() {
  alive "$D/run/slurmctld.pid" && { timeout 10 scancel --user=root 2>/dev/null || true; sleep 1; }
  pids=
  for p in slurmd.n1 slurmd.n2 slurmd.n3 slurmctld munged; do
    f=$D/run/$p.pid; if alive "$f"; then pids="$pids $(cat "$f")"; fi
  done
  for p in $pids; do kill "$p" 2>/dev/null || true; done
  for _ in $(seq 20); do  # a slurmd removes its file at once and may wait for a step long afterwards
    n=0; for p in $pids; do kill -0 "$p" 2>/dev/null && n=1; done
    [ $n = 0 ] && return 0; sleep 0.3
  done
  for p in $pids; do kill -9 "$p" 2>/dev/null || true; done
}
node() {  # own UTS + mount namespace: its own hostname and an /etc/hosts that knows all nodes
  unshare --mount --uts bash -c "mount --bind '$D/hosts' /etc/hosts && hostname $1 && exec slurmd -N $1"
}
up() {
  P=$1
  H=$(hostname -s)
  mkdir -p "$D"/{run,log,state,spool.n1,spool.n2,spool.n3,dev}; chmod 755 "$D" "$D/run" "$D/log"
  [ -f "$D/munge.key" ] || { head -c 1024 /dev/urandom > "$D/munge.key"; chmod 600 "$D/munge.key"; }
  for i in 0 1; do [ -e "$D/dev/gpu$i" ] || mknod "$D/dev/gpu$i" c 1 3; done   # gres needs a character device: a copy of /dev/null
  printf '127.0.0.1 localhost %s n1 n2 n3\n' "$H" > "$D/hosts"
  printf 'NodeName=n[1-3] Name=gpu File=%s/dev/gpu[0-1]\n' "$D" > "$D/gres.conf"
  cat > "$D/slurm.conf" <<CONF
ClusterName=loop
SlurmctldHost=$H(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
FirstJobId=$P
SlurmctldPort=$P
SlurmdPort=$((P + 1))
SrunPortRange=$((P + 10))-$((P + 99))
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
InactiveLimit=0
Waittime=0
JobRequeue=1
SlurmctldTimeout=60
SlurmdTimeout=6
NodeName=n1 NodeAddr=127.0.0.1 Port=$((P + 2)) CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 Port=$((P + 3)) CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n3 NodeAddr=127.0.0.1 Port=$((P + 4)) CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=aside Nodes=n3 MaxTime=INFINITE State=UP
CONF
  rm -f "$D/run/munge.sock"*
  munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
         --log-file="$D/log/munged.log" --seed-file="$D/run/munged.seed"
  slurmctld -c; sleep 1
  node n1
  node n2
  node n3
  for _ in $(seq 40); do [ "$(sinfo -h -t idle -o %n 2>/dev/null | sort -u | wc -l)" = 3 ] && { sinfo; return 0; }; sleep 0.5; done
  sinfo; tail -n 5 "$D"/log/*.log >&2; return 1
}
case $cmd in up) up "$3" ;; node) node "$3" ;; down) down ;; *) echo "usage: $0 up DIR PORT | node DIR NAME | down DIR" >&2; exit 2;; esac

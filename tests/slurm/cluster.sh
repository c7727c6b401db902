#!/usr/bin/env bash
# A throw-away SLURM cluster on one Linux machine: real slurmctld, slurmd and munge, a host in namespaces for each node.
#
#   CLUSTER_STATE=FOLDER cluster.sh up N          start it; of one that runs, start what has died
#   CLUSTER_STATE=FOLDER cluster.sh exec CMD...   run CMD where users log in:  exec sbatch slurm/train.sh
#   CLUSTER_STATE=FOLDER cluster.sh fail NODE     power failure of a node
#   CLUSTER_STATE=FOLDER cluster.sh down          end all jobs and daemons at once, remove the state
#
# Nodes: node9, node10, ..., whose names only SLURM can resolve, with pretended cores and GPUs; the login host is ctl. Partitions: `train` (default), and
# `preemptible`, whose jobs make room for those in `train`. Needs root, and the commands that `up` names where it lacks them
# (Debian: slurmctld slurmd slurm-client munge iproute2). No systemd, no database. All lives in the state folder, whose path
# must be short: the daemons' sockets are in it.
set -euo pipefail

STATE=${CLUSTER_STATE:?the folder for the state}
GPUS=4 CPUS=64 # of a node
GRACE_SECONDS=15 # that a preempted job keeps after its SIGTERM
CONF=$STATE/etc/slurm.conf
FREEZER=/sys/fs/cgroup/freezer # cgroup v1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NETNS_STATE=$STATE
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "cluster.sh: $*" >&2; exit 1; }
source "$HERE/processes.sh"

at() { "$HERE/netns.sh" exec "$@"; } # HOST CMD...
as_user() { at ctl env SLURM_CONF="$CONF" "$@"; }
nodes() { seq -f 'node%g' 9 "$((8 + $(<"$STATE/nodes")))"; }
address() { cat "$STATE/hosts/$1/addr"; }

daemon() { # NAME HOST CMD...: start it unless it runs; on no host, if HOST is -
  local name=$1 host=$2
  shift 2
  if alive "$STATE/run/$name"; then return; fi
  if [[ $host != - ]]; then set -- "$HERE/netns.sh" exec "$host" "$@"; fi
  (cd "$STATE" && SLURM_CONF=$CONF exec setsid "$@") </dev/null >>"$STATE/log/$name.out" 2>&1 9>&- &
  record "$STATE/run/$name" $!
}

# How SLURM finds a job's processes decides which of them get its signals. On real clusters, with cgroups, a task's own
# children get none but SIGKILL; linuxproc signals all descendants. SLURM names its cgroups after the nodes: where another
# cluster has them, this one does without.
track_processes() {
  local node
  for node in $(nodes); do
    if ! mkdir "$FREEZER/slurm_$node" 2>/dev/null || ! rmdir "$FREEZER/slurm_$node"; then echo linuxproc && return; fi
  done
  echo cgroup
}
remove_cgroups() {
  local node
  for node in $(nodes); do
    [[ ! -d $FREEZER/slurm_$node ]] || find "$FREEZER/slurm_$node" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
}

write_configuration() {
  local node gpu gpus
  # Given device files, SLURM sets CUDA_VISIBLE_DEVICES as on a real node; without, it only counts.
  gpus="File=$STATE/dev/gpu[0-$((GPUS - 1))]"
  for ((gpu = 0; gpu < GPUS; gpu++)); do mknod "$STATE/dev/gpu$gpu" c 1 3 2>/dev/null || gpus="Count=$GPUS"; done
  echo "Name=gpu $gpus" >"$STATE/etc/gres.conf"
  printf '%s\n' CgroupAutomount=no CgroupPlugin=cgroup/v1 >"$STATE/etc/cgroup.conf" # or the plugin guesses
  cat >"$CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl($(address ctl))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire also sets how long a requeued job waits before it starts again (SLURM's own default: 120 seconds).
AuthInfo=socket=$STATE/munge/socket,cred_expire=5

StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/run/slurmctld.pidfile
SlurmdPidFile=$STATE/run/%n.pidfile
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log

# Nothing is measured or confined: nodes have what this file says they have.
ProctrackType=proctrack/$(<"$STATE/proctrack")
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu

# Quicker than SLURM's own defaults (in brackets).
# [300] A node that is silent this long is down, and its jobs are lost.
SlurmdTimeout=10
# [30] Between SIGTERM and SIGKILL.
KillWait=10
# [300] Finished jobs stay in \`scontrol show job\`: there is no database.
MinJobAge=86400
# [0] A node that comes back is used again.
ReturnToService=2
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$(for node in $(nodes); do
    echo "NodeName=$node NodeAddr=$(address "$node") CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS"
  done)
PartitionName=DEFAULT Nodes=ALL State=UP DefaultTime=60 MaxTime=INFINITE
PartitionName=train Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preemptible PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE_SECONDS
CONF
}

start_munged() {
  if [[ ! -s $STATE/munge/key ]]; then (umask 077; head -c 128 /dev/urandom >"$STATE/munge/key"); fi
  chmod 711 "$STATE/munge"
  if ! alive "$STATE/run/munged"; then rm -f "$STATE"/munge/socket*; fi
  daemon munged - munged --foreground --num-threads=2 --origin=127.0.0.1 \
    --key-file="$STATE/munge/key" --socket="$STATE/munge/socket" \
    --pid-file="$STATE/munge/pid" --seed-file="$STATE/munge/seed" --log-file="$STATE/munge/log"
  within 10 test -S "$STATE/munge/socket" || die "munged did not start: $(tail -n 3 "$STATE/log/munged.out")"
}

all_nodes_are_up() {
  alive "$STATE/run/slurmctld" || die "slurmctld ended: $(tail -n 1 "$STATE/log/slurmctld.out")"
  (($(as_user sinfo -h -N -p train -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l) == $(<"$STATE/nodes")))
}

up() { # N
  local node names missing=()
  ((EUID == 0)) || die "needs root"
  ((${#STATE} <= 70)) || die "$STATE is too long a path for the daemons' sockets"
  for name in slurmctld slurmd sbatch munged ip; do command -v $name >/dev/null || missing+=("$name"); done
  ((${#missing[@]} == 0)) || die "not installed: ${missing[*]}"
  mkdir -p "$STATE"/{etc,munge,ctld,spool,log,run,dev}
  chmod 755 "$STATE"
  chmod 700 "$STATE/ctld"
  echo "$1" >"$STATE/nodes"
  mapfile -t names < <(nodes)
  "$HERE/netns.sh" up "${names[@]}" ctl
  [[ -s $STATE/proctrack ]] || track_processes >"$STATE/proctrack"
  [[ -s $CONF ]] || write_configuration
  start_munged
  daemon slurmctld ctl slurmctld -D -f "$CONF"
  for node in "${names[@]}"; do
    mkdir -p "$STATE/spool/$node"
    daemon "$node" "$node" slurmd -D -N "$node" -f "$CONF"
  done
  within 60 all_nodes_are_up || { as_user sinfo >&2; die "not all nodes came up: see $STATE/log"; }
}

down() {
  local name
  if [[ -s $STATE/nodes ]]; then
    "$HERE/netns.sh" down # a power failure everywhere
    for name in $(nodes) slurmctld munged; do
      stop "$STATE/run/$name" TERM 2 || stop "$STATE/run/$name" KILL 5 || die "$name would not stop"
    done
    if [[ $(cat "$STATE/proctrack" 2>/dev/null) == cgroup ]]; then remove_cgroups; fi
  fi
  rm -rf "$STATE"
}

command=${1:-}
shift || true
case $command in
  up | down)
    exec 9>"$STATE.lock" # one at a time
    flock -w 120 9 || die "$STATE.lock is held"
    ;;
esac
case $command in
  up) up "$@" ;;
  exec) as_user "$@" ;;
  fail) "$HERE/netns.sh" off "$1" ;;
  down)
    down
    rm -f "$STATE.lock"
    ;;
  *) die "up, exec, fail or down, not '$command'" ;;
esac

#!/usr/bin/env bash
# Trains on one or many nodes of a SLURM cluster, through time limits, preemption and node failures.
#
#   sbatch [sbatch's options] slurm/train.sh [--config FILE] [--section.key VALUE]...
#
# Submit it from the repository's folder, on a file system that all nodes share, after `make setup` (slurm/README.md).
# From the environment: LAUNCHER=torchrun|srun, NPROC (ranks a node; default: its GPUs), MAX_TRIES (100), MAX_RESTARTS (0),
# SHUTDOWN_TIMEOUT (110 seconds), PYTHON.
#
# What a cluster or a job may want otherwise; options given to sbatch win over these lines:
#SBATCH --job-name=dist_trainer
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#
# What survival needs:
#SBATCH --ntasks-per-node=1
# A requeued job keeps its id: append, or the log of its first life is lost.
#SBATCH --open-mode=append
# Back to the queue after a node failure or a preemption, which SLURM does by itself ...
#SBATCH --requeue
# ... and a warning to this shell this many seconds before the time limit, so that it can do the same. Must be enough for
# a step, a checkpoint and a minute.
#SBATCH --signal=B:USR1@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 2

LAUNCHER=${LAUNCHER:-torchrun} TRY=${SLURM_RESTART_COUNT:-0} MAX_TRIES=${MAX_TRIES:-100}
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID, try $TRY] $*"; }
refuse() { say "refused: $*"; exit 2; }

[[ -x launch/multinode.sh ]] || refuse "$PWD is not the repository's folder: cd there before sbatch"
command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON: run \`make setup TORCH=gpu\` there before sbatch, or set PYTHON"
[[ $LAUNCHER == torchrun || $LAUNCHER == srun ]] || refuse "LAUNCHER is $LAUNCHER; it can be torchrun or srun"
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))') == *+cpu ]]; then
  say "WARNING: the job has GPUs, but $PYTHON has a torch without CUDA: run \`make clean && make setup TORCH=gpu\`"
fi

# --- which run is this? A config error is refused here, before any rank starts --------------------
resolved=$("$PYTHON" -m dist_trainer.train "$@" --print_config) || refuse "the config (see above)"
key() { "$PYTHON" -c "import sys, yaml; print(yaml.safe_load(sys.stdin)$1)" <<<"$resolved"; }
run_folder=$(key '["output_dir"]')/$(key '["run_name"]')
# Begin anew once, not after each return from the queue.
if ((TRY > 0)) && [[ $(key '["checkpoint"]["resume"]') == never ]]; then set -- "$@" --checkpoint.resume auto; fi
logs=$run_folder/logs
mkdir -p "$logs" || exit 2
# Another life of this run left its last words here.
status() { cat "$run_folder/status.json" 2>/dev/null; }
status_before=$(status)

# --- where the ranks meet ---------------------------------------------------------------------------
# The first node's name, and a port of this job's own, below those that the kernel hands out by itself (32768-60999): two
# jobs on one port would share a rendezvous, and the one would die with the other.
unset NODE_RANK # each node learns its own from srun
export NODES=$SLURM_NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "$MASTER_ADDR" >/dev/null || # a name that only SLURM knows
  MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
RDZV_ID=$SLURM_JOB_ID-$TRY
export MASTER_ADDR MASTER_PORT RDZV_ID

# --- the ranks' environment ---------------------------------------------------------------------------
cores=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-110}
# Some versions of SLURM do not hand --cpus-per-task on to srun: then all ranks of a node share one core.
export SRUN_CPUS_PER_TASK=$cores

# --- signals --------------------------------------------------------------------------------------------
# USR1: the time is nearly up. Ask the ranks to save and leave: TERM to the job's steps, not to the job.
# TERM: somebody ends this job for good, or SLURM requeues it by itself: in neither case our turn.
ended=
trap 'say "the time is nearly up"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'ended=1; say "told to end"' TERM

# --- train ------------------------------------------------------------------------------------------------
say "$run_folder on $SLURM_JOB_NODELIST, $NPROC ranks a node, meeting at $MASTER_ADDR:$MASTER_PORT"
if [[ $LAUNCHER == torchrun ]]; then
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --output="$logs/job-$SLURM_JOB_ID-try-$TRY-%N.log" \
    launch/multinode.sh "$@" &
else
  srun --ntasks=$((NODES * NPROC)) --ntasks-per-node="$NPROC" --cpus-per-task="$OMP_NUM_THREADS" --kill-on-bad-exit=1 \
    --output="$logs/job-$SLURM_JOB_ID-try-$TRY-%N-rank-%t.log" \
    "$PYTHON" -m dist_trainer.train "$@" &
fi
step=$!
# A trap interrupts `wait`: go on waiting while srun lives.
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done
say "srun ended with $code; logs are in $logs"

# --- go on later? -------------------------------------------------------------------------------------------
# A preempted job whose ranks saved and left in time is, for SLURM, simply over: it must put itself back into the queue.
now=$(status)
if [[ -n $ended || $now == "$status_before" || ! $now =~ \"state\":\ *\"preempted\" ]]; then exit "$code"; fi
if ((TRY + 1 >= MAX_TRIES)); then
  say "stopped after saving, but this was try $((TRY + 1)) of $MAX_TRIES (MAX_TRIES); sbatch the same command to go on"
  exit 1
fi
say "stopped after saving: back to the queue"
if scontrol requeue "$SLURM_JOB_ID"; then sleep 600; fi # SLURM ends this script here
say "could not be requeued; sbatch the same command to go on"
exit 1

#!/usr/bin/env bash
# Trains on one or many nodes of a SLURM cluster, through time limits, preemption and node failures.
#
#   sbatch [sbatch's options] slurm/train.sh [--config FILE] [--section.key VALUE]...
#
# Submit it from the repository's folder, on a file system that all nodes share, after `make setup` (slurm/README.md).
# From the environment, or from slurm/site.sh (see slurm/site.example.sh): LAUNCHER=torchrun|srun, NPROC (ranks a node;
# default: its GPUs), MAX_TRIES (100), MAX_RESTARTS (0), SHUTDOWN_TIMEOUT (110 seconds), PYTHON, RANKS_PYTHON, SRUN_OPTIONS,
# CONTAINER_COMMAND, SWEEP (a file with further arguments, a line for each task of a job array).
#
# What a cluster or a job may want otherwise; options given to sbatch win over these lines:
#SBATCH --job-name=dist_trainer
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
# Without --mem a job has what the cluster gives by default, often a few GB a core; 0: all memory of each node.
##SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#
# What survival needs:
#SBATCH --ntasks-per-node=1
# A requeued job keeps its id: append, or the log of its first life is lost.
#SBATCH --open-mode=append
# Back to the queue after a node failure or a preemption, which SLURM does by itself ...
#SBATCH --requeue
# ... and a signal to this shell so many seconds before the time limit, so that it can do the same. A step, two checkpoints
# and half a minute must fit in; a warning says so when they do not.
#SBATCH --signal=B:USR1@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 2

TRY=${SLURM_RESTART_COUNT:-0} MAX_TRIES=${MAX_TRIES:-100}
# The name that SLURM's commands take: the id alone would mean the whole array where this is its last task.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
say() { echo "$(date '+%F %T') [job $JOB, try $TRY] $*"; }
refuse() { say "refused: $*"; exit 2; }

# --- signals: trapped from the first moment on, or they would kill this shell -----------------------
# What SLURM says of this job: `job JobState` is RUNNING.
job() { scontrol show job "$JOB" 2>/dev/null | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p"; }
seconds_left() {
  local end
  end=$(job EndTime)
  end=$(date -d "${end:-Unknown}" +%s 2>/dev/null) && echo $((end - $(date +%s)))
}

newest() { readlink "$run_folder/checkpoints/latest"; }
requeue() { # whether SLURM has taken the job back
  if ((TRY + 1 >= MAX_TRIES)); then
    say "stopped early, but this was try $((TRY + 1)) of $MAX_TRIES (MAX_TRIES); sbatch the same command to go on"
    return 1
  fi
  say "stopped early: back to the queue"
  scontrol requeue "$JOB" && return
  say "could not be requeued; sbatch the same command to go on"
  return 1
}

run_folder='' output='' newest_before='' step='' asked='' left='' told='' ended=''
# USR1: the time is nearly up. Ask the ranks to save and leave: TERM to the job's steps, not to the job.
nearly_up() {
  if [[ -n $asked ]]; then return; fi
  asked=$SECONDS left=$(seconds_left)
  say "the time is nearly up${left:+, $left s are left}"
  if [[ -n $step ]]; then tell_ranks; fi
}
tell_ranks() { # once: they take repeated signals for impatience
  if [[ -n $told ]]; then return; fi
  told=1
  # What is sent before srun has made its step reaches nobody, and scancel does not say so.
  until [[ $(squeue --noheader --steps --jobs="$JOB" --format=%i) =~ \.[0-9] ]] || ! kill -0 "$step" 2>/dev/null; do sleep 0.5; done
  scancel --signal=TERM "$JOB"
}
# TERM: the time is up, and all will be killed in a moment; or somebody ends this job for good, or SLURM requeues it by itself.
told_to_end() {
  if [[ -n $ended ]]; then return; fi
  ended=1
  if [[ $(job Reason) != TimeLimit ]]; then
    say "told to end"
  elif [[ $(newest) == "$newest_before" ]]; then
    say "WARNING: the time is up, and no checkpoint was made in this try: another one would come no further"
  else
    say "WARNING: the time is up before the ranks have left: what came after $(newest) will be done again"
    requeue
  fi
}
trap nearly_up USR1
trap told_to_end TERM

[[ -x launch/multinode.sh ]] || refuse "$PWD is not the repository's folder: cd there before sbatch"
source launch/checks.sh
# What the user's shell had would be wrong here: each node learns its own rank from srun.
unset NODE_RANK MASTER_ADDR
# A cluster's own: modules, an environment, a container. Such scripts often read variables that are not set.
site=${SITE_FILE:-slurm/site.sh}
if [[ -r $site ]]; then
  set +u
  # shellcheck source=slurm/site.example.sh
  source "$(realpath "$site")"
  set -u
elif [[ -n ${SITE_FILE:-} ]]; then
  refuse "there is no $SITE_FILE (SITE_FILE)"
fi
LAUNCHER=${LAUNCHER:-torchrun}
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
RANKS_PYTHON=${RANKS_PYTHON:-$PYTHON}
check_ranks
check_number MAX_TRIES 1 999999999 "how often the job may start"
# SLURM's own requeueing, after a node's failure, counts too.
((TRY < MAX_TRIES)) || refuse "this would be try $((TRY + 1)) of $MAX_TRIES (MAX_TRIES); sbatch the same command to go on"

command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON: run \`make setup TORCH=gpu\` there before sbatch, or set PYTHON"
[[ $LAUNCHER == torchrun || $LAUNCHER == srun ]] || refuse "LAUNCHER is $LAUNCHER; it can be torchrun or srun"
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $RANKS_PYTHON == "$PYTHON" &&
  $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))') == *+cpu ]]; then
  say "WARNING: the job has GPUs, but $PYTHON has a torch without CUDA: run \`make setup TORCH=gpu\`, or where the driver is older" \
    "than that build of torch, one such as \`make setup TORCH=cu126\`"
fi

words=()
split() { # TEXT WHERE-FROM: its words into `words`; quotes count as in a shell, and nothing is executed
  local quoted quote='import shlex, sys; print(shlex.join(shlex.split(sys.argv[1])))'
  quoted=$("$PYTHON" -c "$quote" "$1" 2>/dev/null) || refuse "$2 has a quote without its end: $1"
  eval "words=($quoted)"
}
split "${SRUN_OPTIONS:-}" SRUN_OPTIONS
on_node=(${words[@]+"${words[@]}"}) # between srun and the command of a node, or of a rank
split "${CONTAINER_COMMAND:-}" CONTAINER_COMMAND
on_node+=(${words[@]+"${words[@]}"})

if [[ -n ${SWEEP:-} ]]; then
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || refuse "SWEEP needs a job array: sbatch --array=1-LINES"
  [[ -r $SWEEP ]] || refuse "there is no $SWEEP (SWEEP)"
  line=$(sed -n "$SLURM_ARRAY_TASK_ID{s/\r\$//;p;q}" "$SWEEP" 2>/dev/null)
  split "$line" "line $SLURM_ARRAY_TASK_ID of $SWEEP"
  ((${#words[@]})) || refuse "$SWEEP has no line $SLURM_ARRAY_TASK_ID, or an empty one"
  set -- "$@" "${words[@]}"
fi

# What is asked of the command alone needs no ranks, and a dry run leaves nothing behind, so its ranks speak into this job's log.
if needs_no_ranks "$@"; then exec "$PYTHON" -m dist_trainer.train "$@"; fi
is_dry_run=''
for word in "$@"; do
  if [[ $word == --dry_run ]]; then is_dry_run=1; fi
done

# --- which run is this? A config error is refused here, before any rank starts --------------------
resolved=$("$PYTHON" -m dist_trainer.train "$@" --print_config) || refuse "the config (see above)"
key() { "$PYTHON" -c "import sys, yaml; print(yaml.safe_load(sys.stdin)$1)" <<<"$resolved"; }
run_folder=$("$PYTHON" -c 'import os, sys; print(os.path.expanduser(sys.argv[1]))' "$(key '["output_dir"]')/$(key '["run_name"]')")
# Begin anew once, not after each return from the queue.
if ((TRY > 0)) && [[ $(key '["checkpoint"]["resume"]') == never ]]; then set -- "$@" --checkpoint.resume auto; fi
logs=$run_folder/logs
if [[ -z $is_dry_run ]]; then mkdir -p "$logs" || exit 2; fi
log_of() { if [[ -z $is_dry_run ]]; then echo "--output=$logs/job-$SLURM_JOB_ID-try-$TRY-$1.log"; fi; }
# Another life of this run left its last words here.
status() { cat "$run_folder/status.json" 2>/dev/null; }
status_before=$(status) newest_before=$(newest)

# --- is the signal early enough? -------------------------------------------------------------------
# Seconds that a step and two checkpoints took when last measured (one may be on its way to the disk already), and half a
# minute for all else; nothing where no life of this run has measured them yet.
needed() {
  "$PYTHON" - "$run_folder" 2>/dev/null <<'END'
import json, math, pathlib, sys
folder = pathlib.Path(sys.argv[1])
save = json.loads((folder / "status.json").read_text())["checkpoint_seconds"]
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[-100:]]
step = max((line["step_seconds"] for line in lines if line["kind"] == "train"), default=0)
print(math.ceil(step + 2 * save + 30))
END
}
check_lead() { # SECONDS WHERE-FROM
  local seconds
  seconds=$(needed)
  if [[ -n $seconds ]] && (($1 < seconds)); then
    say "WARNING: this run needs $seconds s to save and leave, but has $1 s ($2): give sbatch --signal=B:USR1@$seconds or more"
  fi
}
lead=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0" 2>/dev/null)}
if [[ $lead == *@* ]]; then check_lead "${lead##*@}" "${SBATCH_SIGNAL:+SBATCH_SIGNAL is }$lead, unless sbatch was told otherwise"; fi

# --- where the ranks meet ---------------------------------------------------------------------------
# The first node, and three ports of this job's own, below those that the kernel hands out by itself (32768-60999): two jobs
# on one port would share a rendezvous, and the one would die with the other.
export NODES=$SLURM_NNODES
if [[ -z ${MASTER_ADDR:-} ]]; then # else slurm/site.sh chose it
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Only SLURM may know the name, and it may mean a loopback address on that node.
  if [[ $(getent hosts "$first_node" || echo ::1) =~ ^(127\.|::1) ]]; then
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  MASTER_ADDR=${MASTER_ADDR:-$first_node}
fi
MASTER_PORT=$((20000 + 3 * (SLURM_JOB_ID % 4000)))
RDZV_ID=$SLURM_JOB_ID-$TRY
export MASTER_ADDR MASTER_PORT RDZV_ID
export DIST_TRAINER_PORT=$((MASTER_PORT + 1)) # as launch/multinode.sh has it

# --- the ranks' environment ---------------------------------------------------------------------------
# On clusters where sbatch has --export=NONE, srun would leave all of this behind.
export SLURM_EXPORT_ENV=ALL SRUN_EXPORT_ENV=ALL # the second wins where a site sets it
# Each node's step has its own; this is the first node's.
gpus_here=${SLURM_GPUS_ON_NODE:-}
unset SLURM_GPUS_ON_NODE
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-110}
# Some versions of SLURM do not hand --cpus-per-task on to srun: then all ranks of a node share one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK RANKS_CORES=$SLURM_CPUS_PER_TASK; fi

# torchrun starts a rank on each GPU of its own node; srun must be told one number for all of them.
if [[ $LAUNCHER == srun && -z ${NPROC:-} ]]; then
  # shellcheck disable=SC2016 # for that shell to expand
  count='source launch/ranks.sh >&2; echo "$ranks"'
  counts=$(PYTHON=$RANKS_PYTHON srun --ntasks-per-node=1 ${on_node[@]+"${on_node[@]}"} bash -c "$count") ||
    refuse "the nodes do not say how many GPUs they have (see above): set NPROC"
  NPROC=$(sort -nu <<<"$counts")
  [[ $NPROC != *$'\n'* ]] || refuse "nodes have ${NPROC//$'\n'/ and } GPUs, but LAUNCHER=srun starts as many ranks on each: set" \
    "NPROC, or LAUNCHER=torchrun, which starts a rank on each GPU"
fi
export NPROC=${NPROC:-}

# --- train ------------------------------------------------------------------------------------------------
say "$run_folder on $SLURM_JOB_NODELIST, ${NPROC:-${gpus_here:-as many as GPUs}} ranks a node, meeting at $MASTER_ADDR:$MASTER_PORT"
code=143
if [[ -z $asked$ended ]]; then # else there is nothing to save yet
  if [[ $LAUNCHER == torchrun ]]; then
    output=$(log_of %N)
    PYTHON=$RANKS_PYTHON srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${output:+"$output"} \
      ${on_node[@]+"${on_node[@]}"} launch/multinode.sh "$@" &
  else
    output=$(log_of %N-rank-%t)
    threads=$((${RANKS_CORES:-1} / NPROC))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    srun --ntasks=$((NODES * NPROC)) --ntasks-per-node="$NPROC" --cpus-per-task="$OMP_NUM_THREADS" --kill-on-bad-exit=1 \
      ${output:+"$output"} ${on_node[@]+"${on_node[@]}"} "$RANKS_PYTHON" -m dist_trainer.train "$@" &
  fi
  step=$!
  if [[ -n $asked ]]; then tell_ranks; fi # the signal came between these lines
  # A trap interrupts `wait`: go on waiting while srun lives.
  while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
  wait "$step" # remembers
  code=$?
fi
say "srun ended with $code${asked:+, $((SECONDS - asked)) s after it was asked to}${output:+; logs are in $logs}"
if [[ -n $left ]]; then check_lead "$left" "so many were left when the signal came"; fi

# --- go on later? -------------------------------------------------------------------------------------------
now=$(status)
said() { [[ $now != "$status_before" && $now =~ \"state\":\ *\"$1\" ]]; }
if [[ -n $ended ]]; then exit "$code"; fi # not our turn
if said preempted; then
  : # A preempted job that saved and left in time is, for SLURM, simply over.
elif said finished || said failed || [[ -z $asked && $(job PreemptTime) != [0-9]* ]]; then
  exit "$code"
else
  say "told to leave before there was anything to save"
fi
if requeue; then
  trap - TERM
  sleep 600 & wait # SLURM ends this script here
fi
exit 1

#!/usr/bin/env bash
# Trains on one or many nodes of a SLURM cluster, through time limits, preemption and node failures.
#
#   sbatch [sbatch's options] slurm/train.sh [--config FILE] [--section.key VALUE]...
#
# Submit it from the repository's folder, on a file system that all nodes share, after `make setup` (slurm/README.md).
# From the environment, or from slurm/site.sh (see slurm/site.example.sh): LAUNCHER=torchrun|srun, NPROC (ranks per
# node; default: its GPUs), MAX_TRIES (100), MAX_RESTARTS (0), SHUTDOWN_TIMEOUT (110 seconds), PYTHON, RANKS_PYTHON, SRUN_OPTIONS,
# CONTAINER_COMMAND, SWEEP (a file with further arguments, one line per task of a job array).
#
# Settings of your cluster and job; options given to sbatch override these lines:
#SBATCH --job-name=dist_trainer
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
# Without --mem a job gets the cluster's default, often a few GB per core; 0: all memory of each node.
##SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#
# Needed to survive time limits, preemption and failures:
#SBATCH --ntasks-per-node=1
# A requeued job keeps its id: append, or the log of the first attempt is lost.
#SBATCH --open-mode=append
# SLURM itself requeues the job after a node failure or a preemption ...
#SBATCH --requeue
# ... and signals this shell this many seconds before the time limit, so that it can requeue the job too. A step, two
# checkpoints and half a minute must fit in; the script warns if they do not.
#SBATCH --signal=B:USR1@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 2

TRY=${SLURM_RESTART_COUNT:-0} MAX_TRIES=${MAX_TRIES:-100}
# The name for SLURM's commands: the id alone would mean the entire array if this is its last task.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
say() { echo "$(date '+%F %T') [job $JOB, try $TRY] $*"; }
refuse() { say "refused: $*"; exit 2; }

# --- signals: trapped from the start, or they would kill this shell ---------------------------------
# A field of SLURM's record of this job: `job JobState` prints RUNNING.
job() { scontrol show job "$JOB" 2>/dev/null | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p"; }
seconds_left() {
  local end
  end=$(job EndTime)
  end=$(date -d "${end:-Unknown}" +%s 2>/dev/null) && echo $((end - $(date +%s)))
}

newest() { readlink "$run_folder/checkpoints/latest"; }
requeue() { # fails if the job may not be requeued
  if ((TRY + 1 >= MAX_TRIES)); then
    say "stopped early, but this was try $((TRY + 1)) of $MAX_TRIES (MAX_TRIES); resubmit the job to continue"
    return 1
  fi
  say "stopped early: requeueing the job"
  scontrol requeue "$JOB" && return
  say "could not requeue the job; resubmit it to continue"
  return 1
}

run_folder='' output='' newest_before='' step='' stopping_since='' left='' ranks_signalled='' terminating=''
# USR1: the time limit is near. Stop the ranks, which save and exit: TERM to the job's steps, not to the job.
on_usr1() {
  if [[ -n $stopping_since ]]; then return; fi
  stopping_since=$SECONDS left=$(seconds_left)
  say "the time limit is near${left:+: $left s left}"
  if [[ -n $step ]]; then signal_ranks; fi
}
signal_ranks() { # once: the third signal would end them without saving
  if [[ -n $ranks_signalled ]]; then return; fi
  ranks_signalled=1
  # A signal sent before srun has created its step reaches nobody, and scancel does not report that.
  until [[ $(squeue --noheader --steps --jobs="$JOB" --format=%i) =~ \.[0-9] ]] || ! kill -0 "$step" 2>/dev/null; do sleep 0.5; done
  scancel --signal=TERM "$JOB"
}
# TERM: the time limit is reached, and all will be killed in a moment; or the job was cancelled, or SLURM itself requeues it.
on_term() {
  if [[ -n $terminating ]]; then return; fi
  terminating=1
  if [[ $(job Reason) != TimeLimit ]]; then
    say "terminating"
  elif [[ $(newest) == "$newest_before" ]]; then
    say "WARNING: time limit reached without a checkpoint in this attempt: another one would get no further"
  else
    say "WARNING: time limit reached before the ranks exited: the steps after $(newest) will be repeated"
    requeue
  fi
}
trap on_usr1 USR1
trap on_term TERM

[[ -x launch/multinode.sh ]] || refuse "$PWD is not the repository's folder: cd there before sbatch"
source launch/checks.sh
# Values from the user's shell would be wrong here: srun gives each node its rank.
unset NODE_RANK MASTER_ADDR
# What the cluster needs: modules, an environment, a container. Such scripts often read variables that are not set.
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
check_number MAX_TRIES 1 999999999 "how many times the job may start"
# SLURM's own requeues, after a node failure, count too.
((TRY < MAX_TRIES)) || refuse "this would be try $((TRY + 1)) of $MAX_TRIES (MAX_TRIES); resubmit the job to continue"

command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON: run \`make setup TORCH=gpu\` before sbatch, or set PYTHON"
[[ $LAUNCHER == torchrun || $LAUNCHER == srun ]] || refuse "LAUNCHER is $LAUNCHER; it can be torchrun or srun"
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $RANKS_PYTHON == "$PYTHON" &&
  $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))') == *+cpu ]]; then
  say "WARNING: the job has GPUs, but $PYTHON has a torch without CUDA: run \`make setup TORCH=gpu\`, or if the driver is too old" \
    "for that build of torch, one such as \`make setup TORCH=cu126\`"
fi

split() { # TEXT SOURCE: sets `words`; quotes work as in a shell, and nothing is executed
  words=()
  [[ -n $1 ]] || return 0
  local quoted quote='import shlex, sys; print(shlex.join(shlex.split(sys.argv[1])))'
  quoted=$("$PYTHON" -c "$quote" "$1" 2>/dev/null) || refuse "$2 has an unclosed quote: $1"
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

# Arguments that only print something need no ranks. A dry run leaves no files, so its ranks print to this job's log.
if needs_no_ranks "$@"; then exec "$PYTHON" -m dist_trainer.train "$@"; fi
is_dry_run=''
for word in "$@"; do
  if [[ $word == --dry_run ]]; then is_dry_run=1; fi
done

# --- which run is this? A config error ends the job here, before any rank starts ------------------
resolved=$("$PYTHON" -m dist_trainer.train "$@" --print_config) || refuse "the config (see above)"
key() { "$PYTHON" -c "import sys, yaml; print(yaml.safe_load(sys.stdin)$1)" <<<"$resolved"; }
folder_of='import os, sys, yaml; print(os.path.expanduser("{output_dir}/{run_name}".format(**yaml.safe_load(sys.stdin))))'
run_folder=$("$PYTHON" -c "$folder_of" <<<"$resolved")
# Start over once, not after each requeue.
if ((TRY > 0)) && [[ $(key '["checkpoint"]["resume"]') == never ]]; then set -- "$@" --checkpoint.resume auto; fi
logs=$run_folder/logs
if [[ -z $is_dry_run ]]; then mkdir -p "$logs" || exit 2; fi
log_of() { if [[ -z $is_dry_run ]]; then echo "--output=$logs/job-$SLURM_JOB_ID-try-$TRY-$1.log"; fi; }
# Before this attempt: how the last one ended, and its newest checkpoint.
status() { cat "$run_folder/status.json" 2>/dev/null; }
status_before=$(status) newest_before=$(newest)

# --- is the signal early enough? -------------------------------------------------------------------
# Seconds for a step and two checkpoints (one may already be on its way to the disk), as last measured, plus half a minute;
# empty if no attempt has measured them yet.
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
check_lead() { # SECONDS SOURCE
  local seconds
  seconds=$(needed)
  if [[ -n $seconds ]] && (($1 < seconds)); then
    say "WARNING: this run needs $seconds s to save and exit, but has $1 s ($2): pass sbatch --signal=B:USR1@$seconds or more"
  fi
}
lead=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0" 2>/dev/null)}
if [[ $lead == *@* ]]; then check_lead "${lead##*@}" "${SBATCH_SIGNAL:+SBATCH_SIGNAL is }$lead, unless overridden on the command line"; fi

# --- the ranks' rendezvous ----------------------------------------------------------------------------
# On the first node, at three ports of this job, below those that the kernel assigns (32768-60999): two jobs on one port would
# share a rendezvous, and one would die with the other.
export NODES=$SLURM_NNODES
if [[ -z ${MASTER_ADDR:-} ]]; then # otherwise slurm/site.sh has set it
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # The name may be known to SLURM only, or resolve to a loopback address on that node.
  if [[ $(getent hosts "$first_node" || echo ::1) =~ ^(127\.|::1) ]]; then
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  MASTER_ADDR=${MASTER_ADDR:-$first_node}
fi
MASTER_PORT=$((20000 + 3 * (SLURM_JOB_ID % 4000)))
RDZV_ID=$SLURM_JOB_ID-$TRY
export MASTER_ADDR MASTER_PORT RDZV_ID
export DIST_TRAINER_PORT=$((MASTER_PORT + 1)) # as in launch/multinode.sh

# --- the ranks' environment ---------------------------------------------------------------------------
# If sbatch has --export=NONE, srun would otherwise pass none of this on.
export SLURM_EXPORT_ENV=ALL SRUN_EXPORT_ENV=ALL # the second one wins if a site sets it
# Each node's step has its own value; this is the first node's.
gpus_here=${SLURM_GPUS_ON_NODE:-}
unset SLURM_GPUS_ON_NODE
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-110}
# Some versions of SLURM do not pass --cpus-per-task on to srun: then all ranks of a node share one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK RANKS_CORES=$SLURM_CPUS_PER_TASK; fi

# torchrun starts one rank per GPU of its own node; srun needs one number for all nodes.
if [[ $LAUNCHER == srun && -z ${NPROC:-} ]]; then
  # shellcheck disable=SC2016 # that shell expands it
  count='source launch/ranks.sh >&2; echo "$ranks"'
  counts=$(PYTHON=$RANKS_PYTHON srun --ntasks-per-node=1 ${on_node[@]+"${on_node[@]}"} bash -c "$count") ||
    refuse "could not count the GPUs of the nodes (see above): set NPROC"
  NPROC=$(sort -nu <<<"$counts")
  [[ $NPROC != *$'\n'* ]] || refuse "nodes have ${NPROC//$'\n'/ and } GPUs, but LAUNCHER=srun starts the same number of ranks" \
    "on each: set NPROC, or LAUNCHER=torchrun, which starts one rank per GPU"
fi
export NPROC=${NPROC:-}

# --- train ------------------------------------------------------------------------------------------------
say "$run_folder on $SLURM_JOB_NODELIST, ranks per node: ${NPROC:-${gpus_here:-one per GPU}}, rendezvous at $MASTER_ADDR:$MASTER_PORT"
code=143
if [[ -z $stopping_since$terminating ]]; then # otherwise there is nothing to save yet
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
  if [[ -n $stopping_since ]]; then signal_ranks; fi # the signal arrived between these lines
  # A trap interrupts `wait`: keep waiting while srun runs.
  while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
  wait "$step" # the shell remembers its exit code
  code=$?
fi
say "srun exited with $code${stopping_since:+, $((SECONDS - stopping_since)) s after the signal}${output:+; logs are in $logs}"
if [[ -n $left ]]; then check_lead "$left" "left when the signal arrived"; fi

# --- continue later? ----------------------------------------------------------------------------------------
now=$(status)
state_is() { [[ $now != "$status_before" && $now =~ \"state\":\ *\"$1\" ]]; }
if [[ -n $terminating ]]; then exit "$code"; fi # decided already
if state_is preempted; then
  : # SLURM does not requeue a preempted job that saved and exited in time.
elif state_is finished || state_is failed || [[ -z $stopping_since && $(job PreemptTime) != [0-9]* ]]; then
  exit "$code"
else
  say "stopped before there was anything to save"
fi
if requeue; then
  trap - TERM
  sleep 600 & wait # SLURM ends this script here
fi
exit 1

# shellcheck shell=bash
# Sourced by local.sh and multinode.sh: which Python, how many ranks on this machine, how many threads each, and the options
# of torchrun that let a run stop, save and restart. Sets: python, ranks, torchrun, OMP_NUM_THREADS.

source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
check_ranks
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "there is no $python: run \`make setup\` in $repository, or name a Python: PYTHON=/path/to/python3" >&2
  exit 2
fi
# Works from any folder, whether or not the package is installed.
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

# One rank per GPU that torch can use (it heeds CUDA_VISIBLE_DEVICES), else per GPU that SLURM gave this node, else one rank for
# the CPU; NPROC overrides.
gpus=0
if may_have_gpu; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if ((gpus == 0)) && has_gpu && [[ -n ${CUDA_VISIBLE_DEVICES-all} ]]; then
    echo "WARNING: this machine has a GPU, but the torch of $python cannot use it, and training runs on the CPU: $(torch_advice)" >&2
  fi
fi
gpus_of_slurm=${SLURM_GPUS_ON_NODE:-0}
ranks=${NPROC:-$((gpus > 0 ? gpus : gpus_of_slurm > 0 ? gpus_of_slurm : 1))}

# Split the cores between the ranks: torchrun would give each of several ranks a single thread.
cores=${RANKS_CORES:-$("$python" -c 'from dist_trainer.distributed.machine import usable_cpus; print(usable_cpus())')}
threads=${OMP_NUM_THREADS:-}
split_threads() { export OMP_NUM_THREADS=${threads:-$((cores / ranks > 0 ? cores / ranks : 1))}; }
split_threads
# Waiting threads that spin would take cores away from ranks that compute.
if ((gpus == 0)); then export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}; fi
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# By default torchrun keeps one store over all restarts, with the dead ranks' addresses in it: restarted ranks then fail to
# connect (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun=("$python" -m torch.distributed.run --max-restarts="${MAX_RESTARTS:-0}")
# Without these, SIGUSR1 kills torchrun and orphans its ranks, and ranks that still save are killed after 30 seconds.
# torch 2.11 may have neither; searching its source is twenty times faster than its --help.
# Under nohup leave SIGHUP out: torchrun would handle it anyway, and forward it.
found=$("$python" -c 'import importlib.util as i, signal as s
print("" if s.getsignal(s.SIGHUP) == s.SIG_IGN else ",SIGHUP", i.find_spec("torch").submodule_search_locations[0], sep="\n")')
hang_up=${found%%$'\n'*} torchrun_source=${found#*$'\n'}/distributed/run.py
if grep -q -- --signals-to-handle "$torchrun_source"; then
  torchrun+=("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1$hang_up")
fi
if grep -q -- --shutdown-timeout "$torchrun_source"; then
  torchrun+=(--shutdown-timeout="${SHUTDOWN_TIMEOUT:-120}")
fi

# Prints the command with secrets masked, since the output may be logged, and execs it: a scheduler's signals must reach torchrun,
# not a shell.
print_and_exec() {
  export DIST_TRAINER_LAUNCHER_PID=$$ # ranks that find another parent have lost their launcher
  local print_masked='import sys; from dist_trainer.config.secrets import masked_command; print(*masked_command(sys.argv[1:]))'
  echo "OMP_NUM_THREADS=$OMP_NUM_THREADS $("$python" -c "$print_masked" "$@")"
  exec "$@"
}

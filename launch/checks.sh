# shellcheck shell=bash
# Sourced by the launch files, slurm/train.sh and setup.sh: rejects invalid settings with a message and exit code 2, looks for a
# GPU, and recognises arguments that need no ranks.

# The variable NAME, if set, must be a whole number from LEAST to MOST.
check_number() { # NAME LEAST MOST MEANING
  local value=${!1-}
  if [[ -z $value || ($value =~ ^(0|[1-9][0-9]{0,8})$ && $value -ge $2 && $value -le $3) ]]; then return; fi
  echo "$1 is '$value', but must be a whole number from $2 to $3: $4" >&2
  exit 2
}
check_ranks() {
  check_number NPROC 1 1024 "ranks per machine; leave it unset for one per GPU"
  check_number RANKS_CORES 1 99999 "cores shared by the ranks; leave it unset to use all"
  check_number MAX_RESTARTS 0 999999999 "how many times torchrun restarts crashed ranks"
  check_number SHUTDOWN_TIMEOUT 1 999999999 "seconds that ranks may take to save after a signal"
}

# Opened, not just looked for: if SLURM gave a job none of the node's GPUs, their files exist but cannot be opened.
has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]] || { true </dev/nvidia0; } 2>/dev/null; }
# Many processors have integrated graphics with a /dev/kfd; only with ROCm, whose tools need not be on PATH, can it compute.
has_amd_gpu() { [[ -e /dev/kfd && (-d /opt/rocm || -n $(command -v rocm-smi amd-smi)) ]]; }
has_gpu() { has_nvidia_gpu || has_amd_gpu; }
# Whether asking torch, which takes seconds, is worthwhile: any NVIDIA GPU, not just the first; AMD; Windows (WSL).
may_have_gpu() { [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg || -n $(command -v nvidia-smi) ]]; }

# Whether these arguments of dist_trainer.train only print something. Complete words only: a prompt may contain " -h ".
needs_no_ranks() {
  local word before=''
  for word in "$@"; do
    case $word in --help | -h | --version | --print_* | --preset=list) return 0 ;; esac
    if [[ $before == --preset && $word == list ]]; then return 0; fi
    before=$word
  done
  return 1
}

# Prints which build of torch can use this machine's GPU.
torch_advice() {
  local driver
  if ! has_nvidia_gpu; then
    echo "make setup TORCH=rocm7.2, or another AMD build listed on pytorch.org"
    return
  fi
  driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
  echo "make setup TORCH=gpu, or another build listed on pytorch.org, such as make setup TORCH=cu126" \
    "${driver:+(the driver supports CUDA $driver and older)}"
}

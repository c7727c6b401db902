# shellcheck shell=bash
# Read by the launch files, slurm/train.sh and setup.sh: refuses settings that cannot be meant, in a sentence and with exit
# code 2, looks for a GPU, and tells arguments that need no ranks.

# A variable that is set must be a whole number from LEAST to MOST.
check_number() { # NAME LEAST MOST WHAT-IT-IS
  local value=${!1-}
  if [[ -z $value || ($value =~ ^(0|[1-9][0-9]{0,8})$ && $value -ge $2 && $value -le $3) ]]; then return; fi
  echo "$1 is '$value', but must be a whole number from $2 to $3: $4" >&2
  exit 2
}
check_ranks() {
  check_number NPROC 1 1024 "ranks on each machine; leave it unset for one on each GPU"
  check_number RANKS_CORES 1 99999 "cores for the ranks to share; leave it unset for all that they may use"
  check_number MAX_RESTARTS 0 999999999 "times that torchrun restarts crashed ranks"
  check_number SHUTDOWN_TIMEOUT 1 999999999 "seconds that ranks may take to save after a signal"
}

# Opened, not looked for: where SLURM gave a job none of the node's GPUs, their files are there, but closed to it.
has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]] || { true </dev/nvidia0; } 2>/dev/null; }
# Many processors have a graphics part with a /dev/kfd; who computes with it has ROCm, whose tools need not be on PATH.
has_amd_gpu() { [[ -e /dev/kfd && (-d /opt/rocm || -n $(command -v rocm-smi amd-smi)) ]]; }
has_gpu() { has_nvidia_gpu || has_amd_gpu; }
# Whether it is worth the seconds to ask torch, which needs no tools: any GPU of NVIDIA's, not just the first; AMD's; Windows' own.
may_have_gpu() { [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg || -n $(command -v nvidia-smi) ]]; }

# Whether these arguments of dist_trainer.train only print something. By whole words: a prompt may contain " -h ".
needs_no_ranks() {
  local word before=''
  for word in "$@"; do
    case $word in --help | -h | --version | --print_* | --preset=list) return 0 ;; esac
    if [[ $before == --preset && $word == list ]]; then return 0; fi
    before=$word
  done
  return 1
}

# Which build of torch can use this machine's GPU.
torch_advice() {
  local driver
  if ! has_nvidia_gpu; then
    echo "make setup TORCH=rocm7.2, or another of the builds for AMD that pytorch.org lists"
    return
  fi
  driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
  echo "make setup TORCH=gpu, or one of the builds that pytorch.org lists, such as make setup TORCH=cu126" \
    "${driver:+(the driver is made for CUDA $driver and older)}"
}

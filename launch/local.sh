#!/usr/bin/env bash
# Trains on this machine: a rank on each of its GPUs, else one process on its CPU.
#
#   launch/local.sh [--config FILE] [--section.key VALUE]...     the arguments of `python -m dist_trainer.train`
#
# NPROC=2 sets the number of ranks, CUDA_VISIBLE_DEVICES=0,1 the GPUs, OMP_NUM_THREADS the threads of a rank,
# MAX_RESTARTS=3 how often torchrun starts ranks that crashed anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

train=(-m dist_trainer.train "$@")
if ((ranks == 1)); then become "$python" "${train[@]}"; fi
# What is asked of the command alone needs no ranks, and a config error should come once, now, and with exit code 2.
case " $* " in *" --help "* | *" -h "* | *" --print_config"*) become "$python" "${train[@]}" ;; esac
"$python" "${train[@]}" --print_config >/dev/null
become "${torchrun[@]}" --standalone "${train[@]}"

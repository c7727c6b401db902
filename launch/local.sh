#!/usr/bin/env bash
# Trains on this machine: one rank per GPU, or one process on the CPU.
#
#   launch/local.sh [--config FILE] [--section.key VALUE]...     the arguments of `python -m dist_trainer.train`
#
# It starts fewer ranks than GPUs if the global batch cannot be split evenly over all. NPROC=2 sets the number of ranks,
# CUDA_VISIBLE_DEVICES=0,1 the GPUs, OMP_NUM_THREADS the threads per rank (or RANKS_CORES=16 how many cores they share),
# MAX_RESTARTS=3 how many times torchrun restarts crashed ranks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

train=(-m dist_trainer.train "$@")
# Arguments that only print something need no ranks, and a config error should come once, now, and with exit code 2.
if needs_no_ranks "$@"; then print_and_exec "$python" "${train[@]}"; fi
if ((ranks > 1)); then config=$("$python" "${train[@]}" --print_config); fi

# As one of $1 ranks the command rejects a batch that they cannot share; a preset's micro-batch depends on their number.
can_share_batch() {
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=$1 MASTER_ADDR=localhost MASTER_PORT=1 "$python" "${train[@]}" --print_config &>/dev/null
}
if ((ranks > 1)) && [[ -z ${NPROC:-} ]]; then
  all=$ranks
  until ((ranks == 1)) || can_share_batch "$ranks"; do ranks=$((ranks - 1)); done
  if ((ranks < all)); then
    batch_size=$(sed -n 's/^ *global_batch_size: *//p' <<<"$config")
    micro_batch_size=$(sed -n 's/^ *micro_batch_size: *\([0-9]*\).*/\1/p' <<<"$config")
    echo "local.sh: training on $ranks of $all GPUs: batch.global_batch_size $batch_size cannot be split evenly over $all ranks;" \
      "to use all, make it a multiple of $((all * ${micro_batch_size:-1}))" >&2
    split_threads
  fi
fi
if ((ranks == 1)); then print_and_exec "$python" "${train[@]}"; fi
# By default the rendezvous is at the machine's own name, which not every machine can resolve.
print_and_exec "${torchrun[@]}" --local-addr=localhost --nproc-per-node="$ranks" --standalone "${train[@]}"

#!/usr/bin/env bash
# Trains on this machine: a rank on each of its GPUs, else one process on its CPU.
#
#   launch/local.sh [--config FILE] [--section.key VALUE]...     the arguments of `python -m dist_trainer.train`
#
# Fewer ranks than GPUs where the global batch cannot be shared out evenly among all. NPROC=2 sets the number of ranks,
# CUDA_VISIBLE_DEVICES=0,1 the GPUs, OMP_NUM_THREADS the threads of a rank
# (or RANKS_CORES=16 how many cores they share), MAX_RESTARTS=3 how often torchrun starts ranks that crashed anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

train=(-m dist_trainer.train "$@")
# What is asked of the command alone needs no ranks, and a config error should come once, now, and with exit code 2.
if needs_no_ranks "$@"; then become "$python" "${train[@]}"; fi
if ((ranks > 1)); then config=$("$python" "${train[@]}" --print_config); fi

# As one of so many ranks the command refuses a batch that they cannot share; a preset's micro-batch follows from their number.
can_share_batch() {
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=$1 MASTER_ADDR=localhost MASTER_PORT=1 "$python" "${train[@]}" --print_config &>/dev/null
}
if ((ranks > 1)) && [[ -z ${NPROC:-} ]]; then
  all=$ranks
  until ((ranks == 1)) || can_share_batch "$ranks"; do ranks=$((ranks - 1)); done
  if ((ranks < all)); then
    batch_size=$(sed -n 's/^ *global_batch_size: *//p' <<<"$config")
    micro_batch_size=$(sed -n 's/^ *micro_batch_size: *\([0-9]*\).*/\1/p' <<<"$config")
    echo "local.sh: training on $ranks of $all GPUs, for $all ranks cannot share batch.global_batch_size $batch_size evenly;" \
      "to use all, make it a multiple of $((all * ${micro_batch_size:-1}))" >&2
    share_out_threads
  fi
fi
if ((ranks == 1)); then become "$python" "${train[@]}"; fi
# By default ranks meet at the machine's own name, which not every machine can resolve.
become "${torchrun[@]}" --local-addr=localhost --nproc-per-node="$ranks" --standalone "${train[@]}"

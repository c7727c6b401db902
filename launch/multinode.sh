#!/usr/bin/env bash
# Trains on several machines: start this on each of them, at about the same time, with the same arguments.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29501 launch/multinode.sh [arguments of dist_trainer.train]
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29501 launch/multinode.sh [the same]
#
# NODES        number of machines
# NODE_RANK    which of them this is: 0, 1, ...
# MASTER_ADDR  address of machine 0, as the others reach it
# MASTER_PORT  a free port there, of this run alone: two runs on one port share a rendezvous and die together
# RDZV_ID      name of the rendezvous, the same everywhere (default: from the port)
# Also NPROC, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS and MAX_RESTARTS, as in local.sh. The machines must share the folder
# that output_dir names. If gloo or NCCL take the wrong network interface, set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.
set -euo pipefail

NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}} # srun says which node this is
missing=()
for name in NODES NODE_RANK MASTER_ADDR MASTER_PORT; do
  if [[ -z ${!name:-} ]]; then missing+=("$name"); fi
done
if ((${#missing[@]})); then
  echo "launch/multinode.sh: not set: ${missing[*]}. For example, on the first of two machines:" >&2
  echo "  NODES=2 NODE_RANK=0 MASTER_ADDR=$(hostname) MASTER_PORT=29501 launch/multinode.sh $*" >&2
  exit 2
fi
if ((NODE_RANK < 0 || NODE_RANK >= NODES)); then
  echo "launch/multinode.sh: NODE_RANK ($NODE_RANK) must be from 0 to NODES - 1 ($((NODES - 1)))" >&2
  exit 2
fi
own_address=$(getent hosts "$(hostname)" 2>/dev/null || true)
if ((NODES > 1)) && [[ -z ${GLOO_SOCKET_IFNAME:-} && $own_address == 127.* ]]; then
  echo "launch/multinode.sh: WARNING: this machine's own name means $own_address, where the others cannot reach it. If the" \
    "ranks do not find one another, set GLOO_SOCKET_IFNAME to the network interface they share (see: ip -br addr)." >&2
fi
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

# c10d, not --master-addr: only with it can ranks be restarted. Machine 0 keeps the store, whatever its name resolves to.
keeps_store=$((NODE_RANK == 0))
become "${torchrun[@]}" --nproc-per-node="$ranks" --nnodes="$NODES" \
  --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-dist_trainer-$MASTER_PORT}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-conf="is_host=$keeps_store" \
  -m dist_trainer.train "$@"

#!/usr/bin/env bash
# Trains on several machines: start this on each of them, at about the same time, with the same arguments.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29501 launch/multinode.sh [arguments of dist_trainer.train]
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29501 launch/multinode.sh [the same]
#
# NODES        number of machines
# NODE_RANK    which of them this is: 0, 1, ...
# MASTER_ADDR  address of machine 0, as the others reach it
# MASTER_PORT  the first of three free ports there: for torchrun's rendezvous, the ranks' rendezvous, and their heartbeat. Runs
#              that share machine 0 need different ports: two on one MASTER_PORT share a rendezvous and die together
# RDZV_ID      name of the rendezvous, the same everywhere (default: from the port)
# Also NPROC, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS and MAX_RESTARTS, as in local.sh. The machines must share the folder
# that output_dir names. gloo uses the network interface that leads to MASTER_ADDR; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
# override gloo's and NCCL's choice.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}} # set by srun
missing=()
for name in NODES NODE_RANK MASTER_ADDR MASTER_PORT; do
  if [[ -z ${!name:-} ]]; then missing+=("$name"); fi
done
if ((${#missing[@]})); then
  echo "launch/multinode.sh: not set: ${missing[*]}. For example, on the first of two machines:" >&2
  echo "  NODES=2 NODE_RANK=0 MASTER_ADDR=$HOSTNAME MASTER_PORT=29501 launch/multinode.sh $*" >&2
  exit 2
fi
MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]} # an IPv6 address may be in brackets, as in a URL
check_number NODES 1 99999 "number of machines"
check_number NODE_RANK 0 99999 "the number of this machine"
check_number MASTER_PORT 1 65533 "the first of three free ports on machine 0"
if ((NODE_RANK >= NODES)); then
  echo "launch/multinode.sh: NODE_RANK ($NODE_RANK) must be from 0 to NODES - 1 ($((NODES - 1)))" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

# c10d, not --master-addr, with which ranks cannot be restarted. Machine 0 keeps the store, whatever its name resolves to.
keeps_store=$((NODE_RANK == 0))
# torchrun gives rank 0 to the machine whose local address sorts first, and puts the ranks' rendezvous there. So machine 0 passes
# MASTER_ADDR, and the others, to whose addresses nobody connects, pass texts that sort after it, by NODE_RANK.
own='import sys; from dist_trainer.distributed.addresses import own_address; print(own_address(sys.argv[1]) or "unknown")'
own_address=$("$python" -c "$own" "$MASTER_ADDR")
if [[ $own_address == unknown ]]; then
  echo "launch/multinode.sh: WARNING: this machine cannot resolve MASTER_ADDR ($MASTER_ADDR), or has no route to it; retrying" \
    "for a minute. An IP address works, too." >&2
fi
local_address=$MASTER_ADDR
if ((NODE_RANK > 0)); then local_address=$(printf '~%05d,%s' "$NODE_RANK" "$own_address"); fi
export DIST_TRAINER_PORT=$((MASTER_PORT + 1)) # otherwise torchrun picks a random port for the ranks' store
print_and_exec "${torchrun[@]}" --local-addr="$local_address" --nproc-per-node="$ranks" --nnodes="$NODES" \
  --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-dist_trainer-$MASTER_PORT}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-conf="is_host=$keeps_store" \
  -m dist_trainer.train "$@"

#!/usr/bin/env bash
# Trains with torchrun: NPROC ranks on this node.
#
#   bash launch/torchrun.sh NPROC CONFIG [overrides]
#   bash launch/torchrun.sh 2 launch/configs/quickstart.yaml --training.steps=100
#
# NPROC: a number, or `gpu` for one rank per GPU. Overrides: see `pi-dist train --help`.
# Several nodes: run the same command on each of them, with these four variables set.
#   NNODES        number of nodes (default 1)
#   NODE_RANK     0 to NNODES - 1, another one on each node
#   MASTER_ADDR   address of node 0 that the other nodes can reach
#   MASTER_PORT   a port that is free on node 0
# OMP_NUM_THREADS (default 1) is the number of CPU threads of each rank.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
if (($# < 2)) || [[ ! "$1" =~ ^([1-9][0-9]*|gpu)$ ]]; then
    echo "usage: bash launch/torchrun.sh NPROC CONFIG [overrides]      (NPROC: a number, or gpu)" >&2
    exit 2
fi
nproc="$1" config="$2"
shift 2

where=(--standalone)
if [[ "${NNODES:-1}" != 1 ]]; then
    for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
        if [[ -z "${!name:-}" ]]; then
            echo "launch/torchrun.sh: NNODES is $NNODES, so $name must be set (see the top of this file)" >&2
            exit 2
        fi
    done
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi

bash "$root/launch/install.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks="$nproc"
if [[ "$nproc" == gpu ]]; then ranks="$("$root/.venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')"; fi
# a bad configuration or bad data are refused here, in one line, before any rank starts
"$root/.venv/bin/python" -m pi_dist train --check $((ranks * ${NNODES:-1})) --config "$config" "$@"
# a signal to the launcher reaches the ranks, which save at the next step boundary; they have ten minutes for it
# (30 seconds with torch 2.11, which does not know the variable)
signals=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec "$root/.venv/bin/python" -m torch.distributed.run "${where[@]}" "${signals[@]}" --nproc-per-node "$nproc" \
    -m pi_dist train --config "$config" "$@"

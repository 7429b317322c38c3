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
# Or let the nodes find out who they are (torchrun's c10d rendezvous): no NODE_RANK, and
#   RDZV_ID       a name of this job, the same on all nodes
#   NNODES        may be MIN:MAX: training goes on with MIN nodes when others are lost, and takes them in again
# MAX_RESTARTS (default 0): after a failure all ranks are started again, from the last checkpoint, so many times.
# OMP_NUM_THREADS (default 1) is the number of CPU threads of each rank.
# What each rank says on stderr is also in a file of its own, in logs/ of the run's directory (with a terminal: but for
# rank 0, which draws its bar there). At the end of a failed run torchrun shows the error of the rank that failed first.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
if (($# < 2)) || [[ ! "$1" =~ ^([1-9][0-9]*|gpu)$ ]]; then
    echo "usage: bash launch/torchrun.sh NPROC CONFIG [overrides]      (NPROC: a number, or gpu)" >&2
    exit 2
fi
nproc="$1" config="$2"
shift 2
python="$root/.venv/bin/python"

fail() {
    printf 'launch/torchrun.sh: %s\n' "$*" >&2
    exit 2
}

where=(--standalone)
if [[ "${NNODES:-1}" != 1 ]]; then
    which="${RDZV_ID:+RDZV_ID}"
    for name in "${which:-NODE_RANK}" MASTER_ADDR MASTER_PORT; do
        if [[ -z "${!name:-}" ]]; then
            fail "NNODES is $NNODES, so $name must be set (see the top of this file)"
        fi
    done
    address="$({ getent ahostsv4 "$MASTER_ADDR" || true; } | awk 'NR == 1 { print $1 }')"
    [[ -n "$address" ]] || fail "MASTER_ADDR: the name $MASTER_ADDR resolves to no address"
    if [[ "$address" == 127.* && "$MASTER_ADDR" != 127.* ]]; then
        fail "MASTER_ADDR: $MASTER_ADDR resolves to $address, which other nodes cannot reach; see /etc/hosts"
    fi
    if [[ -z "$which" && "$NODE_RANK" == 0 ]] && (: <"/dev/tcp/$address/$MASTER_PORT") 2>/dev/null; then
        fail "MASTER_PORT: port $MASTER_PORT of $MASTER_ADDR is taken; choose another, the same on all nodes"
    fi
    if [[ -n "$which" ]]; then
        where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
    else
        where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    fi
fi

bash "$root/launch/install.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks="$nproc"
if [[ "$nproc" == gpu ]]; then ranks="$("$python" -c 'import torch; print(torch.cuda.device_count())')"; fi
# a bad configuration or bad data are refused here, in one line, before any rank starts
for nodes in $(tr : '\n' <<<"${NNODES:-1}"); do
    "$python" -m pi_dist train --check $((ranks * nodes)) --config "$config" "$@"
done
run_dir="$("$python" -c 'import sys
from pi_dist.commands.train import read_config
print(read_config(sys.argv[1:]).run_dir)' --config "$config" "$@")"
tee=2 # stderr
if [[ -t 2 ]]; then tee="$(seq 1 $((ranks - 1)) | sed 's/$/:2/' | paste -sd ,)"; fi
if [[ -n "$tee" ]]; then logs=(--log-dir "$run_dir/logs" --tee "$tee"); else logs=(); fi
# shellcheck disable=SC2016 # expanded by torchrun
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
# a signal to the launcher reaches the ranks, which save at the next step boundary; they have ten minutes for it
# (30 seconds with torch 2.11, which does not know the variable)
signals=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# a store of their own for each start of the ranks: a shared one still holds the addresses of those that died
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# nodes of which one has other NNODES or NPROC are refused, not trained on; a range of nodes is any of them
if [[ "${NNODES:-1}" == *:* ]]; then all=(); else all=(--ranks $((ranks * ${NNODES:-1}))); fi
exec "$python" -m torch.distributed.run "${where[@]}" "${signals[@]}" ${logs[@]+"${logs[@]}"} \
    --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" -m pi_dist train ${all[@]+"${all[@]}"} \
    --config "$config" "$@"

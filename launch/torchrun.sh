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
# SIGTERM, SIGHUP, SIGINT (Ctrl-C) or SIGUSR1 to this script: the run saves at the next step boundary and ends with 0.
# What each rank says on stderr is also in a file of its own, in logs/ of the run's directory (with a terminal: but for
# rank 0, which draws its bar there). At the end of a failed run torchrun shows the error of the rank that failed first.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
# shellcheck source=launch/forward_signals.sh
source "$root/launch/forward_signals.sh"
# shellcheck source=launch/master_address.sh
source "$root/launch/master_address.sh"
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

nnodes="${NNODES:-1}"
[[ "$nnodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES: $nnodes is no number of nodes, and no range MIN:MAX"
where=(--standalone)
if [[ "$nnodes" != 1 ]]; then
    which="${RDZV_ID:+RDZV_ID}"
    for name in "${which:-NODE_RANK}" MASTER_ADDR MASTER_PORT; do
        if [[ -z "${!name:-}" ]]; then
            fail "NNODES is $nnodes, so $name must be set (see the top of this file)"
        fi
    done
    if [[ -z "$which" ]]; then
        [[ "$nnodes" != *:* ]] || fail "NNODES: a range ($nnodes) needs RDZV_ID, not NODE_RANK"
        if [[ ! "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= nnodes)); then
            fail "NODE_RANK: 0 <= NODE_RANK ($NODE_RANK) < NNODES ($nnodes) does not hold"
        fi
    fi
    is_port "$MASTER_PORT" || fail "MASTER_PORT: 1 <= MASTER_PORT ($MASTER_PORT) <= 65535 does not hold"
    address="$(master_address "$MASTER_ADDR")" || fail "$address"
    if [[ -z "$which" && "$NODE_RANK" == 0 ]] && (: <"/dev/tcp/$address/$MASTER_PORT") 2>/dev/null; then
        fail "MASTER_PORT: port $MASTER_PORT of $MASTER_ADDR is taken; choose another, the same on all nodes"
    fi
    if [[ -n "$which" ]]; then
        where=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
    else
        where=(--nnodes "$nnodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    fi
fi

bash "$root/launch/install.sh"
# someone listens there already: another node's torchrun, or what would keep all of them waiting
is_store='import sys
from torch.distributed import TCPStore
TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False, wait_for_workers=False)'
if [[ -n "${which:-}" ]] && (: <"/dev/tcp/$address/$MASTER_PORT") 2>/dev/null &&
    ! timeout 20 "$python" -c "$is_store" "$address" "$MASTER_PORT" >/dev/null 2>&1; then
    fail "MASTER_PORT: port $MASTER_PORT of $MASTER_ADDR is taken, and not by torchrun; choose another, the same on all nodes"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ranks="$nproc"
if [[ "$nproc" == gpu ]]; then ranks="$("$python" -c 'import torch; print(torch.cuda.device_count())')"; fi
# a bad configuration or bad data are refused here, in one line, before any rank starts
for nodes in $(tr : '\n' <<<"$nnodes"); do
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
# a store of their own for each start of the ranks: a shared one still holds the addresses of those that died
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# nodes of which one has other NNODES or NPROC are refused, not trained on; a range of nodes is any of them
if [[ "$nnodes" == *:* ]]; then all=(); else all=(--ranks $((ranks * nnodes))); fi
# torchrun would end its ranks at a signal, and fail; SIGQUIT is left to it
run_deaf "$python" -m torch.distributed.run "${where[@]}" --signals-to-handle SIGQUIT ${logs[@]+"${logs[@]}"} \
    --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" -m pi_dist train ${all[@]+"${all[@]}"} \
    --config "$config" "$@"
exit "$status"

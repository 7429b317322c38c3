#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: NPROC ranks on this node, or on each node of a hostfile.
#
#   bash launch/deepspeed.sh NPROC CONFIG [overrides]
#   bash launch/deepspeed.sh 2 launch/configs/quickstart.yaml --training.steps=100
#
# Several nodes: set HOSTFILE to a file with one line `NAME slots=NPROC` for each. Started on one of them, it reaches the
# others with pdsh and ssh without a password, and this folder must be at the same place there. Or, without ssh, run the
# same command on each of them, with these three variables set as well:
#   NODE_RANK     0 to the number of nodes - 1, by the lines of the hostfile
#   MASTER_ADDR   address of node 0 that the other nodes can reach
#   MASTER_PORT   a port that is free on node 0
# On one node MASTER_PORT may be set as well (default 29500, DeepSpeed's): two runs at once need two ports.
# OMP_NUM_THREADS (default 1) is the number of CPU threads of each rank. Overrides: see `pi-dist train --help`.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
if (($# < 2)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/deepspeed.sh NPROC CONFIG [overrides]" >&2
    exit 2
fi
nproc="$1" config="$2"
shift 2

nodes=1
where=(--hostfile "" --num_gpus "$nproc") # no hostfile, also where the system has one
if [[ -n "${HOSTFILE:-}" ]]; then
    nodes="$(grep -c 'slots=' -- "$HOSTFILE")" || {
        echo "launch/deepspeed.sh: HOSTFILE $HOSTFILE has no line 'NAME slots=$nproc'" >&2
        exit 2
    }
    where=(--hostfile "$HOSTFILE" --num_gpus "$nproc" --force_multi)
    if [[ -n "${NODE_RANK:-}" ]]; then
        for name in MASTER_ADDR MASTER_PORT; do
            if [[ -z "${!name:-}" ]]; then
                echo "launch/deepspeed.sh: NODE_RANK is set, so $name must be too (see the top of this file)" >&2
                exit 2
            fi
        done
        where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    fi
fi
if [[ -n "${MASTER_PORT:-}" ]]; then where+=(--master_port "$MASTER_PORT"); fi

bash "$root/launch/install.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="$root/.venv/bin/python"
# a bad configuration or bad data are refused here, in one line, before any rank starts
"$python" -m pi_dist train --check $((nproc * nodes)) --config "$config" "$@"
exec "$python" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank --module \
    pi_dist train --ranks $((nproc * nodes)) --config "$config" "$@"

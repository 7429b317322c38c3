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
# SIGTERM, SIGHUP, SIGINT (Ctrl-C) or SIGUSR1 to this script: the run saves at the next step boundary and ends with 0
# (but over ssh: there DeepSpeed tells the nodes to stop, does not wait for them, and ends with 1).
# What each rank says on stderr is also in a file of its own, in logs/ of the run's directory (with a terminal: but for
# rank 0, which draws its bar there).
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
# shellcheck source=launch/forward_signals.sh
source "$root/launch/forward_signals.sh"
# shellcheck source=launch/master_address.sh
source "$root/launch/master_address.sh"
if (($# < 2)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/deepspeed.sh NPROC CONFIG [overrides]" >&2
    exit 2
fi
nproc="$1" config="$2"
shift 2
if [[ -n "${MASTER_PORT:-}" ]] && ! is_port "$MASTER_PORT"; then
    echo "launch/deepspeed.sh: MASTER_PORT: 1 <= MASTER_PORT ($MASTER_PORT) <= 65535 does not hold" >&2
    exit 2
fi

# DeepSpeed joins the arguments into one command for the remote shell. One that has a space it puts between double
# quotes, with a backslash before each double quote; the others it leaves as they are. pdsh replaces %h, %n, %u and %%.
for_remote_shell() {
    local word="$1"
    if [[ "$word" == *" "* ]]; then
        word="${word//\\/\\\\}"
        word="${word//\$/\\$}"
        word="${word//\`/\\\`}"
    else
        word="$(printf %q "$word")"
    fi
    printf '%s' "${word//%/%%}"
}

nodes=1 over_ssh=""
where=(--hostfile "" --num_gpus "$nproc") # no hostfile, also where the system has one
if [[ -n "${HOSTFILE:-}" ]]; then
    nodes="$(grep -s -c '^[^#]*slots=' -- "$HOSTFILE")" || {
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
        if [[ ! "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= nodes)); then
            echo "launch/deepspeed.sh: 0 <= NODE_RANK ($NODE_RANK) < lines of $HOSTFILE ($nodes) does not hold" >&2
            exit 2
        fi
        why="$(master_address "$MASTER_ADDR")" || {
            echo "launch/deepspeed.sh: $why" >&2
            exit 2
        }
        where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    else
        over_ssh=yes
    fi
fi
# where rank 0 will listen; over ssh that is on another node, perhaps
if [[ -z "$over_ssh" && "${NODE_RANK:-0}" == 0 ]]; then
    address="127.0.0.1" port="${MASTER_PORT:-29500}"
    if [[ -n "${NODE_RANK:-}" ]]; then address="$MASTER_ADDR"; fi
    if (: <"/dev/tcp/$address/$port") 2>/dev/null; then
        echo "launch/deepspeed.sh: port $port of $address is taken; set MASTER_PORT to another (the same on all nodes)" >&2
        exit 2
    fi
fi
if [[ -n "${MASTER_PORT:-}" ]]; then where+=(--master_port "$MASTER_PORT"); fi

bash "$root/launch/install.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="$root/.venv/bin/python"
# a bad configuration or bad data are refused here, in one line, before any rank starts
"$python" -m pi_dist train --check $((nproc * nodes)) --config "$config" "$@"
arguments=(train --ranks $((nproc * nodes)) --config "$config" "$@")
if [[ -n "$over_ssh" ]]; then
    for number in "${!arguments[@]}"; do
        arguments[number]="$(for_remote_shell "${arguments[number]}")"
    done
fi

# Alone DeepSpeed's runner dies of a signal and leaves launch.py, its child, with the ranks. Here it tells the ranks:
# launch.py would kill them after 30 s, and end with 1 also if they have saved. (Over ssh the runner has its own way.)
runner='
import contextlib, os, signal, sys
import psutil
from deepspeed.launcher import runner

told = False

def stop(*_):
    global told
    launchers = psutil.Process().children()
    ranks = []
    for launcher in launchers:
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks += launcher.children()
    for process in ranks if ranks or told else launchers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    if not ranks and not told:  # too early: no rank has started
        psutil.wait_procs(launchers)
        sys.exit(128 + signal.SIGTERM)
    told = True

signal.signal(signal.SIGTERM, stop)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
runner.main()
'
run_and_forward TERM "$python" -c "$runner" "${where[@]}" --no_local_rank --module pi_dist "${arguments[@]}"
if ((status == 0)) && [[ -z "$signalled" ]]; then
    # the runner ends with 0 also when launch.py was killed
    saved="$("$python" -m pi_dist train --status --config "$config" "$@")" || {
        status=$?
        echo "launch/deepspeed.sh: the run ended early: $saved" >&2
    }
fi
exit "$status"

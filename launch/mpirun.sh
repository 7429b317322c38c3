#!/usr/bin/env bash
# Trains with mpirun: NPROC ranks, placed by MPI (on this machine, or on the nodes of the surrounding allocation).
#
#   bash launch/mpirun.sh NPROC CONFIG [overrides]
#   bash launch/mpirun.sh 2 launch/configs/quickstart.yaml --training.steps=100
#
# Uses the mpirun of .venv (extra `mpi`), else the system's; installs that extra where there is neither.
# Several nodes without an allocation, with Open MPI 5: set PRTE_MCA_prte_default_hostfile to a file with one line
# `NAME slots=N` for each. It reaches the others with ssh without a password (another program: PRTE_MCA_plm_ssh_agent);
# this folder must be at the same place there, and the first node's own name must resolve to an address others can reach.
# OMP_NUM_THREADS (default 1) is the number of CPU threads of each rank. Overrides: see `pi-dist train --help`.
# SIGTERM, SIGHUP, SIGINT (Ctrl-C) or SIGUSR1 to this script: the run saves at the next step boundary and ends with 0.
# What each rank says on stderr is also in a file of its own, in logs/ of the run's directory.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
# shellcheck source=launch/forward_signals.sh
source "$root/launch/forward_signals.sh"
if (($# < 2)) || [[ ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/mpirun.sh NPROC CONFIG [overrides]" >&2
    exit 2
fi
nproc="$1" config="$2"
shift 2

mpirun="$root/.venv/bin/mpirun"
if [[ -x "$mpirun" ]]; then
    bash "$root/launch/install.sh"
elif mpirun="$(command -v mpirun)"; then
    bash "$root/launch/install.sh"
else
    bash "$root/launch/install.sh" mpi
    mpirun="$root/.venv/bin/mpirun"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
options=(-np "$nproc")
if [[ "$("$mpirun" --version)" == *"Open MPI"* ]]; then
    # More ranks than cores are allowed; ranks are not tied to cores, since each may run loader workers.
    options+=(--oversubscribe --bind-to none -x OMP_NUM_THREADS)
    if ((EUID == 0)); then options+=(--allow-run-as-root); fi
fi
# a bad configuration or bad data are refused here, in one line, before any rank starts
"$root/.venv/bin/python" -m pi_dist train --check "$nproc" --config "$config" "$@"
# mpirun kills the ranks at a SIGTERM or SIGINT; a SIGUSR1 it passes on
run_and_forward USR1 "$mpirun" "${options[@]}" \
    "$root/.venv/bin/python" -m pi_dist train --ranks "$nproc" --config "$config" "$@"
exit "$status"

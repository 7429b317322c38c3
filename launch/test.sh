#!/usr/bin/env bash
# Installs what the tests need and runs them. Ends with pytest's summary line and its exit status.
#
#   bash launch/test.sh [--slow | --slurm] [pytest arguments]      paths are relative to the top of the repository
#
#   bash launch/test.sh                                  everything but the tests marked slow or slurm
#   bash launch/test.sh --slow                           everything but the tests marked slurm
#   bash launch/test.sh --slurm                          those marked slurm: a real SLURM on this machine, installed
#                                                        with apt where it is missing; skipped where it cannot be had
#   bash launch/test.sh tests/test_pattern.py -k reach   some
#   bash launch/test.sh ... --no-skips                   a test that is skipped fails
#   bash launch/test.sh ... -n 0                         one after the other; else files of tests run beside each other
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
which="not slow and not slurm"
workers=(-n 2 --dist loadfile) # tests wait for processes more than they compute
arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) which="not slurm" ;;
        --slurm) which="slurm" workers=() ;; # there is one cluster
        *) arguments+=("$argument") ;;
    esac
done

bash "$root/launch/install.sh" test
cd -- "$root"
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m "$which" ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"}

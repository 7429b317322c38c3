#!/usr/bin/env bash
# Installs what the tests need and runs them. Ends with pytest's summary line and its exit status.
#
#   bash launch/test.sh [--slow] [pytest arguments]      paths are relative to the top of the repository
#
#   bash launch/test.sh                                  everything but the tests marked slow
#   bash launch/test.sh --slow                           everything
#   bash launch/test.sh tests/test_pattern.py -k reach   some
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
options=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --slow ]]; then options=(); else arguments+=("$argument"); fi
done

bash "$root/launch/install.sh" test
cd -- "$root"
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest ${options[@]+"${options[@]}"} ${arguments[@]+"${arguments[@]}"}

#!/usr/bin/env bash
# For launchers that lose their ranks by a signal. Sourced by deepspeed.sh and mpirun.sh.
#
# run_and_forward SIGNAL COMMAND...   runs it to its end, in a process group of its own: Ctrl-C reaches this shell only.
#                                     SIGTERM, SIGHUP, SIGINT and SIGUSR1 to this shell become SIGNAL to the command.
# Sets status, the command's exit status, and signalled, the last signal that came (empty if none did).
set -euo pipefail

run_and_forward() {
    local signal="$1" name ended
    shift
    child="" signalled=""
    # shellcheck disable=SC2064 # expanded now
    for name in TERM HUP INT USR1; do
        trap "signalled=$name interrupted=yes; kill -s $signal \"\$child\" 2>/dev/null || true" "$name"
    done
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    if [[ -n "$signalled" ]]; then kill -s "$signal" "$child" 2>/dev/null || true; fi # it came before the child did
    # a trapped signal ends wait, not the command
    status="" interrupted=yes
    while [[ -n "$interrupted" ]]; do
        interrupted="" ended=0
        wait "$child" || ended=$?
        if [[ -z "$status" || "$ended" != 127 ]]; then status="$ended"; fi # 127: waited for already
    done
    trap - TERM HUP INT USR1
}

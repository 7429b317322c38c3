#!/usr/bin/env bash
# For launchers that lose their ranks by a signal. Sourced by the others of this folder.
#
# run_and_forward SIGNAL COMMAND...   runs it to its end, in a process group of its own: Ctrl-C reaches this shell only.
#                                     SIGTERM, SIGHUP, SIGINT and SIGUSR1 to this shell become SIGNAL to the command.
# Sets status, the command's exit status, and signalled, the last signal that came (empty if none did).
#
# run_deaf COMMAND...                 runs it to its end, deaf to these signals: from the first that comes to this shell
#                                     its children, the ranks, get SIGUSR1 every second, since one that is only just
#                                     starting would miss a single one. It dies with this shell. Sets status.
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

run_deaf() {
    local rank ranks pause keep=()
    child="" signalled=""
    exec {pause}<> <(:) # nothing comes there
    trap "signalled=yes" TERM HUP INT USR1
    if command -v setpriv >/dev/null; then keep=(setpriv --pdeathsig KILL --); fi
    (
        trap "" TERM HUP INT USR1
        exec ${keep[@]+"${keep[@]}"} "$@"
    ) </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if [[ -n "$signalled" ]]; then
            ranks="$(cat "/proc/$child/task/"*/children 2>/dev/null)" || true
            for rank in $ranks; do kill -s USR1 "$rank" 2>/dev/null || true; done
        fi
        read -r -t 1 -u "$pause" || true # `sleep` would hide from wait how the command ended, where two signals came
    done
    status=0
    wait "$child" || status=$?
    exec {pause}<&-
    trap - TERM HUP INT USR1
}

#!/usr/bin/env bash
# Sourced by launchers of several nodes.
#
# master_address NAME     prints the IPv4 address of NAME; else why other nodes cannot reach it, with status 1
# is_port TEXT            whether it is a port
set -euo pipefail

master_address() {
    local address
    address="$({ getent ahostsv4 "$1" || true; } | awk 'NR == 1 { print $1 }')"
    if [[ -z "$address" ]]; then
        printf 'MASTER_ADDR: the name %s resolves to no address' "$1"
        return 1
    fi
    if [[ "$address" == 127.* && "$1" != 127.* ]]; then
        printf 'MASTER_ADDR: %s resolves to %s, which other nodes cannot reach; see /etc/hosts' "$1" "$address"
        return 1
    fi
    printf '%s' "$address"
}

is_port() {
    [[ "$1" =~ ^[1-9][0-9]{0,4}$ ]] && (($1 <= 65535))
}

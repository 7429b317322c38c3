#!/usr/bin/env bash
# A real SLURM on this machine: slurmctld, munge and N slurmd with fake GPUs, to try templates out and to test them.
#
#   bash slurm/local_cluster.sh up   [--nodes N] [--netns] [--dir DIR] [--port PORT]
#   bash slurm/local_cluster.sh down [--wipe] [--dir DIR]
#
# up installs Debian's packages if they are missing and it runs as root, waits until all nodes are up (seconds), and
# prints how to use the cluster: `DIR/on ctl sbatch ...` and, without --netns, `export SLURM_CONF=DIR/slurm.conf`.
#   --nodes N    nodes node1 ... nodeN, with 4 CPUs and 8 GPUs each, none of them real (default 2)
#   --netns      each node is a network namespace with its own address and host name, as hosts are (root only);
#                then clients run through `DIR/on ctl COMMAND`, and commands of a node through `DIR/on node1 COMMAND`
#   --dir DIR    state and logs (default .slurm at the top of the repository; an absolute path of up to 60 characters)
#   --port PORT  the first of about 1000 ports on the loopback address or in the namespaces (default 17000)
#   --wipe       remove DIR afterwards
# Partitions: debug (default) and high, whose jobs preempt those of debug: USR1, 10 s later TERM, then requeued.
# down ends the jobs and leaves no process, namespace or route behind. Both may be repeated. Exit status 3: SLURM is not
# here and cannot be installed.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
export PATH="$PATH:/usr/sbin:/sbin"
cpus=4 gpus=8 subnet=10.77.0

fail() {
    printf 'local_cluster: %s\n' "$*" >&2
    exit "${status:-1}"
}

usage() {
    sed -n 's/^#   bash /usage: bash /p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

action="${1:-}" nodes=2 netns="" dir="$root/.slurm" port=17000 wipe=""
[[ "$action" == up || "$action" == down ]] || usage
shift
while (($# > 0)); do
    case "$1" in
        --nodes | --dir | --port)
            (($# > 1)) || usage
            declare "${1#--}=$2"
            shift
            ;;
        --netns) netns="yes" ;;
        --wipe) wipe="yes" ;;
        *) usage ;;
    esac
    shift
done
[[ "$nodes" =~ ^[1-9][0-9]?$ && "$port" =~ ^[1-9][0-9]{3,4}$ ]] || usage
# SLURM's configuration knows no quotes, and a socket's path may have 107 characters
[[ "$dir" =~ ^/[A-Za-z0-9._/-]{1,59}$ ]] ||
    fail "--dir: '$dir' is not an absolute path of letters, digits and ._-/ with up to 60 characters"
export SLURM_CONF="$dir/slurm.conf"

# alive PIDFILE NAME: that process runs, is no zombie, and is the program meant (a number may have been given anew)
alive() {
    local pid
    pid="$(cat "$1" 2>/dev/null)" && [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "$2" ]] &&
        [[ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null)" == [!ZX]* ]]
}

# until_true TENTHS COMMAND...: repeat it every 0.1 s until it succeeds
until_true() {
    local tenths="$1"
    shift
    while ! "$@"; do
        ((tenths-- > 0)) || return 1
        sleep 0.1
    done
}

install_packages() {
    local program missing="" status=3
    for program in slurmctld slurmd sbatch munged; do
        command -v "$program" >/dev/null || missing+=" $program"
    done
    if [[ -z "$missing" ]]; then return; fi
    command -v apt-get >/dev/null || fail "no$missing here, and no apt-get to install them with"
    ((EUID == 0)) || fail "no$missing here; as root: apt-get install slurm-wlm slurmctld slurmd slurm-client munge"
    local install=(apt-get install -y -qq --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge)
    local log
    log="$(mktemp)"
    # the packages must not start services of their own
    if ! { DEBIAN_FRONTEND=noninteractive "${install[@]}" || { apt-get update -qq && "${install[@]}"; }; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 3 "$log" >&2
        rm -f "$log"
        fail "the packages$missing cannot be had with apt-get"
    fi
    rm -f "$log"
}

# --- namespaces: one for the controller with a bridge, one per node with an address on it

netns_prefix() { printf 'pi%s' "$(cksum <<<"$dir" | cut -d' ' -f1)"; }

make_namespaces() {
    local prefix="$1" node
    { ((EUID == 0)) && ip netns list >/dev/null; } || fail "--netns needs root and the program ip (iproute2)"
    {
        printf '127.0.0.1 localhost\n%s.254 ctl\n' "$subnet"
        for node in $(seq "$nodes"); do printf '%s.%s node%s\n' "$subnet" "$node" "$node"; done
    } >"$dir/hosts"
    # what is sent there from outside the namespaces must not go to a gateway
    ip route replace unreachable "$subnet.0/24"
    if [[ ! -e "/run/netns/$prefix-ctl" ]]; then
        ip netns add "$prefix-ctl" || fail "--netns: this machine does not let us make network namespaces"
        ip -n "$prefix-ctl" link set lo up
        ip -n "$prefix-ctl" link add br0 type bridge
        ip -n "$prefix-ctl" addr add "$subnet.254/24" dev br0
        ip -n "$prefix-ctl" link set br0 up
    fi
    for node in $(seq "$nodes"); do
        if [[ -e "/run/netns/$prefix-node$node" ]]; then continue; fi
        ip netns add "$prefix-node$node"
        ip -n "$prefix-node$node" link set lo up
        # a cut-off node's connections end after about 15 s, not 15 minutes
        ip netns exec "$prefix-node$node" sysctl -qw net.ipv4.tcp_retries2=5
        ip -n "$prefix-ctl" link add "v$node" type veth peer name eth0 netns "$prefix-node$node"
        ip -n "$prefix-ctl" link set "v$node" master br0 up
        ip -n "$prefix-node$node" addr add "$subnet.$node/24" dev eth0
        ip -n "$prefix-node$node" link set eth0 up
    done
}

# DIR/on HOST COMMAND...: run it on that host
# shellcheck disable=SC2016 # the quoted $ are those of the file written
write_on() {
    local prefix="$1"
    {
        printf '#!/usr/bin/env bash\nset -euo pipefail\nexport SLURM_CONF=%q\n' "$SLURM_CONF"
        if [[ -n "$prefix" ]]; then
            printf 'exec nsenter --net="/run/netns/%s-$1" unshare -mu --propagation private bash -c \\\n' "$prefix"
            printf '    '"'"'mount --bind %q /etc/hosts && hostname "$0" && exec "$@"'"'"' "$@"\n' "$dir/hosts"
        else
            printf 'exec "${@:2}"\n'
        fi
    } >"$dir/on"
    chmod +x "$dir/on"
}

on() { "$dir/on" "$@"; }

start_munge() {
    if alive "$dir/run/munged.pid" munged; then return; fi
    [[ -s "$dir/munge.key" ]] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    munged --force --socket="$dir/run/munge.sock" --key-file="$dir/munge.key" --num-threads=2 \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
}

write_configuration() {
    local controller=localhost address=127.0.0.1 listen="CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" node
    if [[ -n "$netns" ]]; then controller=ctl address="$subnet.254" listen=""; fi
    for node in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/gpu$node"; done # a GPU wants to be a device
    printf 'Name=gpu File=%s/gpu[0-%s]\n' "$dir" $((gpus - 1)) >"$dir/gres.conf"
    {
        cat <<CONF
ClusterName=local
SlurmctldHost=$controller($address)
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SrunPortRange=$((port + 100))-$((port + 999))
$listen
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
UnkillableStepTimeout=30
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus RealMemory=1000 Gres=gpu:$gpus State=UNKNOWN
CONF
        for node in $(seq "$nodes"); do
            if [[ -n "$netns" ]]; then
                printf 'NodeName=node%s NodeHostname=node%s NodeAddr=%s.%s Port=%s\n' \
                    "$node" "$node" "$subnet" "$node" $((port + 1))
            else
                printf 'NodeName=node%s NodeHostname=localhost NodeAddr=127.0.0.1 Port=%s\n' "$node" $((port + node))
            fi
        done
        printf 'PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10\n'
        printf 'PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10\n'
    } >"$SLURM_CONF"
}

all_nodes_up() {
    [[ "$(on ctl sinfo -h -N -r -p debug -t idle,alloc,mix -o %N 2>/dev/null | sort -u | wc -l)" == "$nodes" ]]
}

up() {
    local node prefix="" wanted="$nodes ${netns:-no} $port"
    install_packages
    mkdir -p "$dir"/{state,log,run}
    for node in $(seq "$nodes"); do mkdir -p "$dir/spool.node$node"; done
    if alive "$dir/run/slurmctld.pid" slurmctld && [[ "$(cat "$dir/run/shape" 2>/dev/null)" != "$wanted" ]]; then
        fail "another cluster runs in $dir (nodes, netns, port: $(cat "$dir/run/shape")); take it down first"
    fi
    printf '%s\n' "$wanted" >"$dir/run/shape"
    if [[ -n "$netns" ]]; then
        prefix="$(netns_prefix)"
        make_namespaces "$prefix"
    fi
    write_on "$prefix"
    start_munge
    write_configuration
    alive "$dir/run/slurmctld.pid" slurmctld || on ctl slurmctld
    for node in $(seq "$nodes"); do
        alive "$dir/run/slurmd.node$node.pid" slurmd || on "node$node" slurmd -N "node$node"
    done
    if ! until_true 600 all_nodes_up; then # one that was cut off may take half a minute
        on ctl sinfo -N -l >&2 || true
        fail "not all nodes came up; see $dir/log"
    fi
    printf '%s nodes are up; run commands on them with %s/on, for example: %s/on ctl sinfo\n' "$nodes" "$dir" "$dir"
    if [[ -z "$netns" ]]; then printf 'export SLURM_CONF=%s\n' "$SLURM_CONF"; fi
}

# Numbers of our daemons, and of what jobs have left: those carry our SLURM_CONF in their environment.
our_processes() {
    local file name
    for file in "$dir"/run/slurmd.*.pid "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
        name="$(basename "$file")"
        if alive "$file" "${name%%.*}"; then cat "$file" 2>/dev/null || true; fi
    done
    for file in /proc/[0-9]*/environ; do
        name="${file//[!0-9]/}"
        if [[ "$name" == "$$" || "$name" == "$BASHPID" ]]; then continue; fi
        { tr '\0' '\n' <"$file"; } 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
        if [[ "$(cat "/proc/$name/comm" 2>/dev/null)" == slurmstepd ]] ||
            { tr '\0' '\n' <"$file"; } 2>/dev/null | grep -q '^SLURM_JOB_ID='; then
            printf '%s\n' "$name"
        fi
    done
}

no_jobs() { [[ -z "$(timeout 5 "$dir/on" ctl squeue -h 2>/dev/null)" ]]; }
none_left() { [[ -z "$(our_processes)" ]]; }

down() {
    local pids prefix name
    if alive "$dir/run/slurmctld.pid" slurmctld; then
        timeout 5 "$dir/on" ctl scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
        timeout 5 "$dir/on" ctl scancel --user="$(id -un)" 2>/dev/null || true
        until_true 30 no_jobs || true
    fi
    for name in TERM KILL KILL; do
        pids="$(our_processes)"
        if [[ -z "$pids" ]]; then break; fi
        xargs -r kill -s "$name" <<<"$pids" 2>/dev/null || true
        until_true 50 none_left || true
    done
    none_left || fail "these processes do not end: $(our_processes | tr '\n' ' ')"
    rm -f "$dir"/run/*.pid
    prefix="$(netns_prefix)"
    for name in "/run/netns/$prefix-"*; do
        if [[ -e "$name" ]]; then ip netns del "${name##*/}"; fi
    done
    if [[ -e "$dir/hosts" ]] && ! compgen -G '/run/netns/pi*-ctl' >/dev/null; then # no other cluster needs it
        ip route del unreachable "$subnet.0/24" 2>/dev/null || true
    fi
    if [[ -n "$wipe" ]]; then rm -rf -- "$dir"; fi
}

"$action"

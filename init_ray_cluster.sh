#!/usr/bin/env bash
# Start Ray on the hosts of a hostfile: the head on the first, the others join it by its address.
#
#   bash init_ray_cluster.sh [--status | --stop | --dry-run | --help] [HOSTFILE]
#
# HOSTFILE (default: $HOSTFILE, else /etc/mpi/hostfile, else this machine alone, without ssh) has one host a line, as
# [USER@]HOST[:PORT] [slots=N]. Each host has this folder and ENV_DIR at the same paths (deploy_env.sh --all-nodes).
#
#   (start)    waits until every node is registered with its CPUs and GPUs; where all runs already it does nothing, and
#              where only some do it starts the others
#   --status   what runs where
#   --stop     end the Ray that this script started on these hosts with this RAY_PORT, and nothing else
#   --dry-run  print what would be run; goes with the others
#
# Environment, the same for start, --status, --stop and the launch script:
#   ENV_DIR          Python environment on every host (default: .venv beside this script)
#   RAY_PORT         port of the head (default: 6379); clusters with different ports do not meet
#   CLUSTER_DIR      folder on each host for logs, sockets and the cluster's token (default: /tmp/kvray-<user id>)
# and of start alone:
#   NODE_IP          address of the head, or name of the interface that every host uses (default: what the hostfile
#                    calls the head; on the others, where the route to the head leaves from)
#   NUM_CPUS, NUM_GPUS   of each host (default: what it has)
#   DASHBOARD_HOST, DASHBOARD_PORT   where the dashboard listens (default: 127.0.0.1 and 8265; none: no dashboard)
#   RAY_START_OPTIONS    further options of `ray start`, such as --min-worker-port=20000 --max-worker-port=20999
#   WAIT_S, START_S  seconds to wait for all nodes (120), and for Ray to start on one host (90)
# of --stop alone: STOP_S, seconds that the processes of a host have to end by themselves (15)
# and SSH_PORT, SSH_OPTS (quoted as in a shell), CONNECT_S, LOG_DIR: ssh's port and options, seconds to wait for a
# connection (10), folder of the hosts' logs (outputs/cluster).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

SELF="${BASH_SOURCE[0]}"
[[ ! -L "$SELF" ]] || SELF="$(readlink -f "$SELF")"
ROOT="$(cd "$(dirname "$SELF")" && pwd)"
SCRIPT=ray_cluster
NODE="$ROOT/scripts/ray_node.sh"
ENV_DIR="$(realpath --canonicalize-missing "${ENV_DIR:-$ROOT/.venv}")"
PASSED=(ENV_DIR RAY_PORT CLUSTER_DIR NODE_IP NUM_CPUS NUM_GPUS DASHBOARD_HOST DASHBOARD_PORT RAY_START_OPTIONS START_S STOP_S
    GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME RAY_TOKEN)
# shellcheck source=SCRIPTDIR/scripts/hosts.sh
source "$ROOT/scripts/hosts.sh"
RAY_PORT="${RAY_PORT:-6379}"

# Ask every host; ends here, with nothing started, if one cannot be asked or has other versions.
look() {
    AT=("${!HOSTS[@]}")
    each_host state on_host "$NODE" state
    if ! failures state "cannot take part" || ! agree state; then die "nothing was started"; fi
}

# Hosts on which Ray does not run, into IDLE; ends here if those on which it runs belong to another cluster.
find_idle() {
    local index head other
    IDLE=()
    head="$(answer state 0 head)"
    for index in "${!HOSTS[@]}"; do
        if [[ "$(answer state "$index" state)" != running ]]; then
            IDLE+=("$index")
            continue
        fi
        other="$(answer state "$index" head)"
        [[ "${IDLE[0]:-}" != 0 ]] || die "${HOSTS[index]} runs Ray, and the head, ${HOSTS[0]}, does not; end it: --stop"
        [[ "$other" == "$head" ]] || die "${HOSTS[index]} belongs to the cluster at $other, not $head; end it: --stop"
    done
}

start_on() {
    local index="$1"
    if ((index == 0)); then
        on_host 0 "$NODE" start "${HOST_ADDRESSES[0]}" head "${HOST_ADDRESSES[1]:-}"
    else
        on_host "$index" "$NODE" start "${HOST_ADDRESSES[index]}" "$HEAD"
    fi
}

start() {
    local IDLE=("${!HOSTS[@]}") HEAD="HEAD:$RAY_PORT" failed=0
    look
    [[ -n "$DRY_RUN" ]] || find_idle
    if ((${#IDLE[@]} == 0)); then
        say "running already on ${HOSTS[*]}, head $(answer state 0 head); nothing to do"
        return
    fi
    if ((IDLE[0] == 0)); then
        AT=(0) IDLE=("${IDLE[@]:1}")
        say "starting the head on ${HOSTS[0]}"
        each_host start start_on
        failures start "the head did not start" || die "there is no cluster"
    fi
    [[ -n "$DRY_RUN" ]] || HEAD="$(on_host 0 "$NODE" known head)"
    join || failed=1
    if ! wait_nodes "$failed"; then die "the cluster is not complete; mend what is named above and run this again, or --stop"; fi
    say "ready: ${#HOSTS[@]} nodes, head $HEAD"
}

# The idle hosts join the head, all at once.
join() {
    ((${#IDLE[@]})) || return 0
    AT=("${IDLE[@]}")
    say "joining $HEAD: ${#AT[@]} more"
    local RAY_TOKEN=""
    # shellcheck disable=SC2034 # one of PASSED
    [[ -n "$DRY_RUN" ]] || RAY_TOKEN="$(on_host 0 "$NODE" secret)"
    each_host start start_on
    failures start "could not join $HEAD"
}

# Wait for the report of each host; not for long if it is known that one is missing ($1).
wait_nodes() {
    local index cpus=0 gpus=0 addresses=() address limit="${WAIT_S:-120}" log
    [[ -z "$DRY_RUN" ]] || { on_host 0 "$NODE" nodes --wait "$limit"; return; }
    (($1 == 0)) || limit=5
    AT=("${!HOSTS[@]}")
    each_host state on_host "$NODE" state
    for index in "${AT[@]}"; do
        address="$(answer state "$index" address)"
        addresses+=("${address:-${HOSTS[index]}}")
        cpus=$((cpus + $(answer state "$index" cpus || true) + 0)) gpus=$((gpus + $(answer state "$index" gpus || true) + 0))
        check_slots "$index"
    done
    log="$(host_log nodes 0)"
    on_host 0 "$NODE" nodes --wait "$limit" --cpus "$cpus" --gpus "$gpus" "${addresses[@]}" 2>&1 | tee "$log" && (($1 == 0)) && return
    for index in "${AT[@]}"; do
        ! grep -qxF "missing ${addresses[index]}" "$log" || complain "${HOSTS[index]} is not registered with the head"
    done
    return 1
}

check_slots() {
    local slots="${HOST_SLOTS[$1]}" gpus
    gpus="$(answer state "$1" gpus)"
    [[ -z "$slots" || "${gpus:-0}" == 0 ]] || ((gpus >= slots)) ||
        complain "${HOSTS[$1]} has $gpus GPUs, and slots=$slots in the hostfile"
}

status() {
    local index
    AT=("${!HOSTS[@]}")
    each_host state on_host "$NODE" state
    [[ -z "$DRY_RUN" ]] || return 0
    for index in "${AT[@]}"; do
        say "${HOSTS[index]}: $(answer state "$index" state) $(answer state "$index" address)"
    done
    failures state "cannot be asked" || true
    [[ "$(answer state 0 state)" != running ]] || on_host 0 "$NODE" nodes
}

stop() {
    local index
    AT=("${!HOSTS[@]}")
    each_host stop on_host "$NODE" stop
    [[ -z "$DRY_RUN" ]] || return 0
    failures stop "could not be stopped" || exit 1
    say "stopped on ${HOSTS[*]}"
}

main() {
    local action=start hostfile="" AT=()
    while (($#)); do
        case "$1" in
            --stop) action=stop ;;
            --status) action=status ;;
            --dry-run) DRY_RUN=yes ;;
            --help | -h) usage; exit 0 ;;
            -*) die "unknown argument $1 (see --help)" ;;
            *) hostfile="$1" ;;
        esac
        shift
    done
    hostfile="$(find_hostfile "$hostfile")"
    read_hosts "$hostfile"
    "$action"
}

main "$@"

#!/usr/bin/env bash
# Start Ray on the machines of a hostfile: the head on the first, the others join it.
#
#   bash init_ray_cluster.sh [--status | --stop | --dry-run] [HOSTFILE]
#
# HOSTFILE (or $HOSTFILE, default /etc/mpi/hostfile) names one machine a line; each must be reachable by ssh without a
# password and see this folder at the same path. The head must be the machine this script runs on.
#
# Environment:
#   ENV_DIR    Python environment on every machine (default: .venv beside this script)
#   RAY_PORT   port of the head (default: 6379)
#   NODE_IP    address of the head (default: the first of this machine)
#   SSH_OPTS   further options of ssh
#   WAIT_S     seconds to wait for all machines (default: 120)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_DIR="${ENV_DIR:-$ROOT/.venv}"
RAY_PORT="${RAY_PORT:-6379}"
WAIT_S="${WAIT_S:-120}"

say() { printf '[ray_cluster] %s\n' "$*"; }
die() { printf '[ray_cluster] error: %s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

hosts_in() { sed 's/#.*//' "$1" | awk 'NF && !seen[$1]++ { print $1 }'; }

run() {
    if [[ "$DRY_RUN" == yes ]]; then printf '%s\n' "$*"; else "$@"; fi
}

on_host() {
    local host="$1"
    shift
    # SSH_OPTS holds several words on purpose.
    # shellcheck disable=SC2086
    run ssh -o BatchMode=yes ${SSH_OPTS:-} "$host" "$*"
}

nodes_alive() {
    "$ENV_DIR/bin/python" - "$1" <<'PY'
import logging
import sys

import ray

ray.init(address=sys.argv[1], logging_level=logging.ERROR)
print(sum(node["Alive"] for node in ray.nodes()))
PY
}

start() {
    local head_ip="$1"
    shift
    run "$ENV_DIR/bin/ray" start --head --node-ip-address="$head_ip" --port="$RAY_PORT" --include-dashboard=false
    local host
    for host in "${@:2}"; do
        on_host "$host" "$ENV_DIR/bin/ray" start --address="$head_ip:$RAY_PORT" || die "$host could not join"
    done
    [[ "$DRY_RUN" == yes ]] && return
    local deadline=$((SECONDS + WAIT_S)) alive=0
    until ((alive >= $#)); do
        ((SECONDS < deadline)) || die "have $alive of $# nodes after $WAIT_S s"
        alive="$(nodes_alive "$head_ip:$RAY_PORT")"
        say "have $alive of $# nodes"
        ((alive >= $#)) || sleep 2
    done
}

stop() {
    local host
    for host in "${@:2}"; do on_host "$host" "$ENV_DIR/bin/ray" stop || say "$host: could not stop Ray"; done
    run "$ENV_DIR/bin/ray" stop
}

main() {
    local action=start hostfile="${HOSTFILE:-/etc/mpi/hostfile}"
    DRY_RUN=no
    while (($#)); do
        case "$1" in
            --stop) action=stop ;;
            --status) action=status ;;
            --dry-run) DRY_RUN=yes ;;
            -h | --help) usage; exit 0 ;;
            -*) die "unknown argument $1 (see --help)" ;;
            *) hostfile="$1" ;;
        esac
        shift
    done
    [[ -f "$hostfile" ]] || die "hostfile $hostfile does not exist; name one, or set HOSTFILE"
    local hosts=()
    mapfile -t hosts < <(hosts_in "$hostfile")
    ((${#hosts[@]})) || die "hostfile $hostfile names no host"
    local head_ip="${NODE_IP:-$(hostname -I | awk '{ print $1 }')}"
    case "$action" in
        start) start "$head_ip" "${hosts[@]}" ;;
        stop) stop "${hosts[@]}" ;;
        status) run "$ENV_DIR/bin/ray" status --address="$head_ip:$RAY_PORT" ;;
    esac
}

main "$@"

#!/usr/bin/env bash
# Ray on the machine this runs on; init_ray_cluster.sh calls it on every host.
#
#   bash scripts/ray_node.sh start NAME head PEER   start the head; NAME is this host in the hostfile, PEER another host
#   bash scripts/ray_node.sh start NAME ADDRESS     join the head at ADDRESS (HOST:PORT); RAY_TOKEN has its token
#   bash scripts/ray_node.sh state                  "state running|stopped|broken", what is known of it, "versions ..."
#   bash scripts/ray_node.sh stop                   end what was started here, and nothing else
#   bash scripts/ray_node.sh nodes [--wait ...]     the cluster's nodes, from its head (scripts/ray_nodes.py)
#   bash scripts/ray_node.sh secret                 the cluster's token
#   bash scripts/ray_node.sh known FACT             head, address, interface, cpus or gpus of the node that runs here
#   bash scripts/ray_node.sh folder                 the folder of all this on this machine
#
# A node is one session of processes, led by `ray start --block`: whatever Ray starts belongs to it, and nothing else
# does. The folder has what is known of it: node (the leader's process id and start time), facts, token, ray.log, and
# Ray's own files under r/. Its name is short because Ray puts sockets below it, whose paths have at most 107 bytes.
#
# Environment: ENV_DIR, RAY_PORT, NODE_IP, NUM_CPUS, NUM_GPUS, CLUSTER_DIR, DASHBOARD_HOST, DASHBOARD_PORT,
# RAY_START_OPTIONS, START_S, STOP_S, as init_ray_cluster.sh describes them.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ENV_DIR="${ENV_DIR:-$ROOT/.venv}"
RAY_PORT="${RAY_PORT:-6379}"
CLUSTER_DIR="${CLUSTER_DIR:-/tmp/kvray-$(id -u)}"
# Hosts may share a file system: the machine's name tells their folders apart.
NODE_DIR="$CLUSTER_DIR/$RAY_PORT-$(uname -n | cksum | cut -d' ' -f1)"
LONGEST_NODE_DIR=41

die() { printf '%s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

# A field of /proc/PID/stat as proc(5) counts them; the process's name, field 2, may hold anything.
stat_field() {
    local stat fields
    { stat="$(<"/proc/$1/stat")"; } 2>/dev/null || return 1
    read -ra fields <<<"${stat##*) }"
    printf '%s\n' "${fields[$2 - 3]}"
}

# The leader's process id and start time, into LEADER and BEGAN.
known_node() { { read -r LEADER BEGAN <"$NODE_DIR/node"; } 2>/dev/null; }

leader_alive() {
    [[ "$(stat_field "$LEADER" 22)" == "$BEGAN" && "$(stat_field "$LEADER" 3)" != Z ]]
}

# Living processes of the node. Linux gives a session's number to nobody while a process of it lives; a leader that
# began at another time, or a member that began before it, shows that the session is somebody else's.
members() {
    local began stat pid
    began="$(stat_field "$LEADER" 22 || echo "$BEGAN")"
    [[ "$began" == "$BEGAN" ]] || return 0
    for stat in /proc/[0-9]*; do
        pid="${stat#/proc/}"
        [[ "$(stat_field "$pid" 6 || true)" == "$LEADER" && "$(stat_field "$pid" 3 || true)" != Z ]] || continue
        if (("$(stat_field "$pid" 22 || echo 0)" >= BEGAN)); then echo "$pid"; fi
    done
}

# What was found out of this machine when the node started.
known() { sed -n "s/^$1 //p" "$NODE_DIR/facts"; }

# running, broken (its leader is gone and others are left) or stopped, into NOW.
look() {
    NOW=stopped
    if known_node; then
        if leader_alive; then NOW=running; elif [[ -n "$(members)" ]]; then NOW=broken; fi
    fi
}

state() {
    [[ -x "$ENV_DIR/bin/python" ]] || die "there is no Python environment in $ENV_DIR; run deploy_env.sh --all-nodes, or set ENV_DIR"
    look
    echo "state $NOW"
    [[ "$NOW" == stopped ]] || cat "$NODE_DIR/facts"
    "$ENV_DIR/bin/python" "$ROOT/scripts/versions.py"
}

prepare_folder() {
    ((${#NODE_DIR} <= LONGEST_NODE_DIR)) ||
        die "CLUSTER_DIR=$CLUSTER_DIR is $((${#NODE_DIR} - LONGEST_NODE_DIR)) characters too long for Ray's sockets; name a shorter one"
    (umask 077 && mkdir -p "$CLUSTER_DIR") || die "the folder $CLUSTER_DIR cannot be made; set CLUSTER_DIR"
    [[ -O "$CLUSTER_DIR" ]] || die "$CLUSTER_DIR belongs to somebody else; set CLUSTER_DIR"
    rm -rf "$NODE_DIR"
    mkdir -m 700 "$NODE_DIR"
}

write_token() {
    local token="${RAY_TOKEN:-}"
    [[ -n "$token" ]] || token="$(head -c 64 /dev/urandom | sha256sum | cut -d' ' -f1)"
    (umask 077 && printf '%s' "$token" >"$NODE_DIR/token")
}

# Ray's environment on this node, which its workers inherit.
ray_environment() {
    unset RAY_TOKEN RAY_ADDRESS RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$NODE_DIR/token"
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=2
    # A host that does not answer is given up after four times 3 + 5 s; Ray's own settings take 65 s over it.
    export RAY_health_check_period_ms=3000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

start() {
    local name="$1" head="$2" peer="${3:-}" address interface cpus gpus
    look
    [[ "$NOW" != running ]] || die "Ray runs here already"
    [[ "$NOW" != broken ]] || stop
    local facts=("$ENV_DIR/bin/python" "$ROOT/scripts/node_facts.py" --node-ip "${NODE_IP:-}" --name "$name") found
    if [[ "$head" == head ]]; then
        facts+=(--peer "$peer" --port "$RAY_PORT")
    else
        peer="${head%:*}"
        facts+=(--peer "${peer//[][]/}" --reach "$head")
    fi
    found="$("${facts[@]}")" || exit 1
    read -r address interface cpus gpus <<<"$found"
    prepare_folder
    write_token
    local options=(--block --node-ip-address="$address" --num-cpus="$cpus" --num-gpus="$gpus" --temp-dir="$NODE_DIR/r"
        --disable-usage-stats --log-color=false)
    if [[ "$head" != head ]]; then
        options+=(--address="$head")
    else
        head="$address:$RAY_PORT"
        [[ "$address" != *:* ]] || head="[$address]:$RAY_PORT"
        options+=(--head --port="$RAY_PORT")
        if [[ "${DASHBOARD_HOST:-}" == none ]]; then
            options+=(--include-dashboard=false)
        else
            options+=(--dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --dashboard-port="${DASHBOARD_PORT:-8265}")
        fi
    fi
    printf '%s\n' "head $head" "address $address" "interface $interface" "cpus $cpus" "gpus $gpus" >"$NODE_DIR/facts"
    local more
    mapfile -t more < <(xargs -r printf '%s\n' <<<"${RAY_START_OPTIONS:-}")
    ray_environment
    # Interfaces may be called otherwise on each host, so each node says which is its own.
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
    lead "$ENV_DIR/bin/ray" start "${options[@]}" ${more[@]+"${more[@]}"} </dev/null >"$NODE_DIR/ray.log" 2>&1 &
    LEADER=$!
    BEGAN="$(stat_field "$LEADER" 22)" || BEGAN=0
    echo "$LEADER $BEGAN" >"$NODE_DIR/node"
    wait_started
    cat "$NODE_DIR/facts"
}

# Become the leader of a session of its own, without files that the caller holds open, such as locks.
lead() {
    local file
    for file in "/proc/$BASHPID/fd/"*; do
        ((${file##*/} <= 2)) || eval "exec ${file##*/}>&-"
    done
    exec setsid "$@"
}

wait_started() {
    local deadline=$((SECONDS + ${START_S:-90}))
    until grep -q 'Ray runtime started' "$NODE_DIR/ray.log"; do
        if ! leader_alive || ((SECONDS >= deadline)); then
            tail -n 10 "$NODE_DIR/ray.log" >&2
            leader_alive && echo "Ray did not start within ${START_S:-90} s (START_S)" >&2
            echo "Ray's log: $(uname -n):$NODE_DIR/ray.log" >&2
            stop >&2
            exit 1
        fi
        sleep 0.2
    done
}

stop() {
    local pids deadline
    look
    [[ "$NOW" != stopped ]] || { echo "state stopped"; return 0; }
    pids="$(members)"
    echo "ending $(wc -w <<<"$pids") processes"
    # The leader ends the others in Ray's order; whatever is left of the session after that is killed.
    if leader_alive; then kill -TERM "$LEADER" 2>/dev/null || true; fi
    deadline=$((SECONDS + ${STOP_S:-15}))
    while leader_alive && ((SECONDS < deadline)); do sleep 0.2; done
    deadline=$((SECONDS + 20))
    while pids="$(members)" && [[ -n "$pids" ]]; do
        ((SECONDS < deadline)) || die "processes $(xargs <<<"$pids") do not end"
        # shellcheck disable=SC2086 # one word for each process
        kill -KILL $pids 2>/dev/null || true
        sleep 0.2
    done
    rm -f "$NODE_DIR/node"
    echo "state stopped"
}

main() {
    case "${1:-}" in
        start) [[ $# -ge 3 ]] || die "start needs NAME and head or ADDRESS (see --help)"; start "${@:2}" ;;
        stop) stop ;;
        state) state ;;
        secret) cat "$NODE_DIR/token" ;;
        known)
            look
            [[ "$NOW" == running ]] || die "init_ray_cluster.sh has started no Ray that runs here on RAY_PORT=$RAY_PORT"
            known "${2:-head}" ;;
        folder) printf '%s\n' "$NODE_DIR" ;;
        nodes)
            ray_environment
            exec "$ENV_DIR/bin/python" "$ROOT/scripts/ray_nodes.py" --address "$(known head)" "${@:2}" ;;
        --help | -h) usage ;;
        *) die "unknown argument ${1:-} (see --help)" ;;
    esac
}

main "$@"

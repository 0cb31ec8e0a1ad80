# shellcheck shell=bash
# What the scripts for clusters share: the hosts of a hostfile, and a script of this checkout run on each of them.
#
# Sourced, not run; the caller sets SCRIPT (its name in messages), ROOT (the checkout, at one path on every host) and
# PASSED (the variables that go along to the hosts).
# A hostfile has one host a line, with comments and blank lines:
#
#   [USER@]HOST[:PORT] [slots=N [max_slots=M]]   HOST a name or an address, IPv6 in brackets; PORT that of its sshd
#
# or, as batch systems write it, each host once for each of its ranks.
#
# Settings read here: HOSTFILE, SSH_PORT, SSH_OPTS (options of ssh, quoted as in a shell), CONNECT_S, LOG_DIR.
# Work goes to a host over ssh's standard input, so that nothing shows on a command line or depends on a login shell.

DEFAULT_HOSTFILE=/etc/mpi/hostfile
# Clusters on ports of their own have logs of their own, for what they say is read.
LOG_DIR="${LOG_DIR:-$ROOT/outputs/cluster${RAY_PORT:+-$RAY_PORT}}"
DRY_RUN="${DRY_RUN:-}"
case "${DRY_RUN,,}" in 0 | no | false | off) DRY_RUN="" ;; esac

HOSTS=()        # what each host is called: its name or address, with :PORT where the hostfile has one
HOST_TARGETS=() # USER@HOST for ssh; empty: this machine, without ssh
HOST_ADDRESSES=() # what the hostfile calls it, without user and port
HOST_PORTS=()   # port of its sshd, or empty
HOST_SLOTS=()   # N of slots=N, or empty
HOST_STATUS=()  # exit status of the last each_host, by host
HOST_SECONDS=() # and how long it took

say() { printf '[%s] %s\n' "$SCRIPT" "$*"; }
complain() { printf '[%s] error: %s\n' "$SCRIPT" "$*" >&2; }
die() { complain "$*"; exit "${DIE_STATUS:-1}"; }

# The comment at the top of a script is its help.
usage() { sed -n '2,/^[^#]/p' "${BASH_SOURCE[-1]}" | sed '$d; s/^# \{0,1\}//'; }

# The hostfile to use: the one given, else HOSTFILE, else the default where it exists, else none.
find_hostfile() {
    local given="${1:-${HOSTFILE:-}}"
    if [[ -n "$given" ]]; then
        [[ -f "$given" ]] || die "hostfile $given does not exist"
        printf '%s\n' "$given"
    elif [[ -f "$DEFAULT_HOSTFILE" ]]; then
        printf '%s\n' "$DEFAULT_HOSTFILE"
    fi
}

# Fill HOSTS and its companions from a hostfile; with none, from this machine alone.
read_hosts() {
    local file="$1" line words number=0 again="" times=() counts
    HOSTS=() HOST_TARGETS=() HOST_ADDRESSES=() HOST_PORTS=() HOST_SLOTS=()
    if [[ -z "$file" ]]; then
        add_host localhost localhost "" ""
        return
    fi
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        ((number > 1)) || line="${line#$'\xef\xbb\xbf'}" # a byte order mark
        line="${line%%#*}"
        read -ra words <<<"${line%$'\r'}"
        ((${#words[@]} == 0)) || add_line "$file, line $number" "${words[@]}"
    done <"$file"
    ((${#HOSTS[@]})) || die "hostfile $file names no host"
    [[ -n "$again" ]] || return 0
    counts="$(printf '%s\n' "${times[@]}" | sort -u)"
    if [[ "$counts" == *$'\n'* || "${HOST_SLOTS[*]}" == *[0-9]* ]]; then
        say "named more than once in $file and counted once:$again (N_GPUS_PER_NODE or slots=N give the ranks per host)" >&2
    else
        say "$file names each host $counts times: $counts ranks per host" >&2
        HOST_SLOTS=("${HOSTS[@]/*/$counts}")
    fi
}

# One line of a hostfile, as words.
add_line() {
    local where="$1" target="$2" slots="" port name
    local pattern='^([A-Za-z_][A-Za-z0-9._-]*@)?(\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9][A-Za-z0-9._-]*)(:([0-9]+))?$'
    [[ "$target" =~ $pattern ]] || die "$where: \"$target\" is no host; write [USER@]HOST[:PORT] [slots=N], IPv6 in brackets"
    local user="${BASH_REMATCH[1]}" address="${BASH_REMATCH[3]:-${BASH_REMATCH[2]}}"
    name="${BASH_REMATCH[2]}${BASH_REMATCH[4]}" port="${BASH_REMATCH[5]}"
    [[ -z "$port" ]] || ((10#$port >= 22 && 10#$port <= 65535)) ||
        die "$where: port $port is none; after the colon comes that of the host's sshd, and its ranks are slots=N"
    local word
    for word in "${@:3}"; do
        [[ ! "$word" =~ ^max[_-]slots=[0-9]+$ ]] || continue # a limit for MPI alone
        [[ "$word" =~ ^slots=([1-9][0-9]*)$ ]] || die "$where: \"$word\" is not understood; after the host comes slots=N or nothing"
        slots="${BASH_REMATCH[1]}"
    done
    local index
    for index in "${!HOSTS[@]}"; do
        if [[ "${HOSTS[index],,}" == "${name,,}" ]]; then
            times[index]=$((times[index] + 1))
            [[ " $again " == *" $name "* ]] || again+=" $name"
            return
        fi
    done
    times+=(1)
    add_host "$name" "$user$address" "$port" "$slots"
}

add_host() {
    local name="$1" target="$2" port="$3" address="${2#*@}"
    if [[ -z "$port" ]] && is_this_machine "$address"; then
        [[ "$target" == *@* && "${target%@*}" != "$(id -un)" ]] || target=""
    fi
    HOSTS+=("$name") HOST_TARGETS+=("$target") HOST_ADDRESSES+=("$address") HOST_PORTS+=("$port") HOST_SLOTS+=("$4")
}

is_this_machine() {
    local address own
    case "$1" in localhost | 127.0.0.1 | ::1 | "$(uname -n)") return 0 ;; esac
    own=" $(hostname -I 2>/dev/null || true) "
    [[ "$own" != *" $1 "* ]] || return 0
    # An address is no name to look up.
    [[ "$1" == *[!0-9.]* && "$1" != *:* ]] || return 1
    for address in $(getent ahosts "$1" 2>/dev/null | awk '{ print $1 }' | sort -u); do
        [[ "$own" != *" $address "* ]] || return 0
    done
    return 1
}

# The ssh command for a host, into SSH_COMMAND. What SSH_OPTS says wins: ssh takes the first of several values.
ssh_command() {
    local port="${HOST_PORTS[$1]:-${SSH_PORT:-}}" words=()
    mapfile -t words < <(xargs -r printf '%s\n' <<<"${SSH_OPTS:-}")
    SSH_COMMAND=(ssh -o BatchMode=yes ${port:+-p "$port"} ${words[@]+"${words[@]}"} -o "ConnectTimeout=${CONNECT_S:-10}"
        -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
}

# on_host INDEX SCRIPT [ARGUMENT...]: run a script of this checkout on a host, with the variables that PASSED names.
on_host() {
    local index="$1" target="${HOST_TARGETS[$1]}" SSH_COMMAND=()
    shift
    if [[ -z "$target" ]]; then
        [[ -z "$DRY_RUN" ]] || { show "$index" bash "$@"; return; }
        remote_script "$@" | bash -s
    else
        ssh_command "$index"
        [[ -z "$DRY_RUN" ]] || { show "$index" "${SSH_COMMAND[@]}" "$target" bash "$@"; return; }
        remote_script "$@" | "${SSH_COMMAND[@]}" "$target" bash -s
    fi
}

show() {
    printf '%s:' "${HOSTS[$1]}"
    printf ' %q' "${@:2}"
    echo
}

remote_script() {
    local name
    for name in "${PASSED[@]}"; do
        [[ -z "${!name:-}" ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'cd %q 2>/dev/null || { echo "there is no %s here; share that folder, or bash deploy_env.sh --all-nodes --copy" >&2; exit 3; }\n' \
        "$ROOT" "$ROOT"
    printf 'exec bash'
    printf ' %q' "$@"
    printf ' </dev/null\n'
}

host_log() { printf '%s/%s-%s.log\n' "$LOG_DIR" "$1" "${HOSTS[$2]//[^A-Za-z0-9._-]/_}"; }

# each_host LABEL COMMAND... on the hosts whose numbers AT holds, all at once: COMMAND INDEX ..., a log for each host.
each_host() {
    local label="$1" command="$2" index log
    local -A running=()
    shift 2
    if [[ -n "$DRY_RUN" ]]; then
        for index in "${AT[@]}"; do "$command" "$index" "$@"; HOST_STATUS[index]=0; done
        return
    fi
    mkdir -p "$LOG_DIR" || die "the folder for logs, $LOG_DIR, cannot be made; set LOG_DIR"
    # What was begun here ends with this script.
    trap 'kill -- "${running[@]/#/-}" 2>/dev/null || true; exit 130' INT TERM
    set -m # each job is a process group, so that what it started ends with it
    for index in "${AT[@]}"; do
        log="$(host_log "$label" "$index")"
        timed "$command" "$index" "$@" >"$log" 2>&1 </dev/null &
        running[$index]=$!
    done
    set +m
    for index in "${AT[@]}"; do
        HOST_STATUS[index]=0
        wait "${running[$index]}" || HOST_STATUS[index]=$?
        # shellcheck disable=SC2034 # read by who sources this
        HOST_SECONDS[index]="$(answer "$label" "$index" seconds)"
    done
    trap - INT TERM
}

timed() {
    local began=$SECONDS status=0
    "$@" || status=$?
    echo "seconds $((SECONDS - began))"
    return "$status"
}

# What a host's log says of something: the rest of the last line that begins with that word.
answer() {
    [[ -n "$DRY_RUN" ]] || sed -n "s/^$3 //p" "$(host_log "$1" "$2")" | tail -n 1
}

# failures LABEL WHAT: name each host of AT that failed, why, and the last lines of its log; 1 if there is any.
failures() {
    local index log reason failed=0
    for index in "${AT[@]}"; do
        [[ "${HOST_STATUS[index]}" != 0 ]] || continue
        failed=1
        log="$(host_log "$1" "$index")"
        reason="$(ssh_reason "${HOST_STATUS[index]}" "$log")"
        complain "${HOSTS[index]}: $2${reason:+: $reason}; the end of $log:"
        grep -v '^seconds ' "$log" | tail -n 12 | sed 's/^/    /' >&2 || true
    done
    return "$failed"
}

ssh_reason() {
    [[ "$1" == 255 ]] || return 0
    if grep -q 'Permission denied' "$2"; then
        echo "its ssh refuses this user or key (SSH_OPTS='-i KEY', or USER@ in the hostfile)"
    elif grep -q 'Host key verification failed' "$2"; then
        echo "its host key is not known here; connect once by hand, or SSH_OPTS='-o StrictHostKeyChecking=accept-new'"
    else
        echo "ssh cannot reach it"
    fi
}

# agree LABEL: compare the lines "versions NAME=VALUE ..." in the logs of AT's hosts; 1 if any value differs, each named.
agree() {
    local index pair name differ=0
    local -A who=() values=()
    for index in "${AT[@]}"; do
        for pair in $(answer "$1" "$index" versions); do
            name="${pair%%=*}"
            who[$pair]+="${who[$pair]:+, }${HOSTS[index]}"
            [[ "${who[$pair]}" != "${HOSTS[index]}" ]] || values[$name]+="$pair "
        done
    done
    for name in "${!values[@]}"; do
        local pairs=()
        read -ra pairs <<<"${values[$name]}"
        ((${#pairs[@]} > 1)) || continue
        differ=1
        local text=""
        for pair in "${pairs[@]}"; do text+="${text:+; }${pair#*=} on ${who[$pair]}"; done
        complain "$name differs between hosts: $text"
    done
    return "$differ"
}

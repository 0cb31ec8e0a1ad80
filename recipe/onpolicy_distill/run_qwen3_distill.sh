#!/usr/bin/env bash
# Distil a student whose vocabulary extends its teacher's.
#
#   BASE_MODEL=... TEACHER_MODEL=... DATASET_PARQUET=... bash run_qwen3_distill.sh [HOSTFILE] [HYDRA_OVERRIDES...]
#
# HOSTFILE (default: $HOSTFILE, else /etc/mpi/hostfile where it exists) has one host a line, as [USER@]HOST[:PORT]
# [slots=N]. Without one, or if it names this machine alone, the run stays on this machine and starts Ray itself. For
# several hosts first run init_ray_cluster.sh HOSTFILE, with the same RAY_PORT and CLUSTER_DIR, then this on one of them.
# What follows goes to Hydra and wins over the settings below.
#
# Environment:
#   BASE_MODEL, TEACHER_MODEL, DATASET_PARQUET   student, teacher, training prompts (required); several files with
#                                                commas between them
#   VAL_PARQUET                                  validation prompts (default: none)
#   EXTEND_VOCAB_START_TOKEN                     first id that the teacher lacks (default: none)
#   MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN           train on nothing of a response that holds one (default: False)
#   DISTILL_ADV_MAX, DISTILL_ADV_MIN             bounds of the advantage (default: 5.0, -30.0)
#   N_GPUS_PER_NODE                              training ranks per host (default: slots of the hostfile, else the
#                                                GPUs of this machine, or 1)
#   OUTPUT_DIR                                   checkpoints and metrics (default: ./outputs/on_policy_distill)
#   ENV_DIR                                      Python environment (default: the active one, else .venv of the checkout)
#   RAY_PORT, CLUSTER_DIR                        as for init_ray_cluster.sh
#   MAX_RESTARTS                                 times that the same command runs again after a rank, an engine or an
#                                                agent-loop worker died, raised or hung (default: 0)
#   DRY_RUN=1                                    print the command and stop; where this machine has the models, tell
#                                                what the run would take of memory too (standard error)
#
# Variables that begin with NCCL_, GLOO_, UCX_, VLLM_, TORCH_, HF_ or TRANSFORMERS_ go along to all hosts, through Ray's
# runtime_env; those that look like secrets do not (workers read a hub's token from its own file on their host). Each
# host finds the interface of its own for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, where you do not name one.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

SELF="${BASH_SOURCE[0]}"
[[ ! -L "$SELF" ]] || SELF="$(readlink -f "$SELF")"
REPO="$(cd "$(dirname "$SELF")/../.." && pwd)"

SCRIPT=run_qwen3_distill
ROOT="$REPO"
DIE_STATUS=2
PASSED=()
# shellcheck source=SCRIPTDIR/../../scripts/hosts.sh
source "$REPO/scripts/hosts.sh"

python_of_run() {
    local env_dir="${ENV_DIR:-${VIRTUAL_ENV:-$REPO/.venv}}"
    if [[ -x "$env_dir/bin/python" ]]; then echo "$env_dir/bin/python"; else command -v python3 || command -v python; fi
}

gpus_here() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then # as CUDA reads it: up to the first that is none
        local visible
        visible="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *\(-1\)\? *$/,$d' | wc -l)"
        ((visible >= gpus)) || gpus="$visible"
    fi
    echo "$((gpus > 0 ? gpus : 1))"
}

# Ranks per host: N_GPUS_PER_NODE, else the slots of the hostfile, else what this machine has.
ranks_per_host() {
    local slots gpus
    slots="$(printf '%s\n' "${HOST_SLOTS[@]}" | sed '/^$/d' | sort -nu)"
    gpus="$(gpus_here)"
    if [[ -n "${N_GPUS_PER_NODE:-}" ]]; then
        echo "$N_GPUS_PER_NODE"
    elif [[ "$slots" == *$'\n'* ]]; then
        die "hosts differ in slots (${slots//$'\n'/, }); every host has the same number of ranks: set N_GPUS_PER_NODE"
    else
        ((${slots:-$gpus} >= gpus)) ||
            say "ranks per host: $slots by the hostfile, and this one has $gpus GPUs; N_GPUS_PER_NODE=$gpus uses them all" >&2
        echo "${slots:-$gpus}"
    fi
}

# Whether a variable of this name holds a secret; the rule is that of verl/utils/redaction.py, and a test holds the two
# together.
looks_secret() {
    local name="_${1^^}_"
    [[ "$name" =~ _(KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS|[A-Z0-9]*CREDENTIAL)_ ||
        "$name" =~ [A-Z0-9]_+(PASS|PWD|AUTH)_+$ ]]
}

# Overrides that give the workers those of this shell's variables that they need: the names alone, and the run reads the
# values from its own environment, whatever characters they hold.
worker_variables() {
    local name
    while IFS= read -r name; do
        if looks_secret "$name"; then continue; fi
        # shellcheck disable=SC2016 # for Hydra to replace
        printf '++ray_kwargs.ray_init.runtime_env.env_vars.%s=${oc.env:%s}\n' "$name" "$name"
    done < <(compgen -e | grep -E '^(NCCL|GLOO|UCX|VLLM|TORCH|HF|TRANSFORMERS)_' || true)
}

# The overrides for it, into connect. Ray that init_ray_cluster.sh did not start is found by its own means.
connect_to_cluster() {
    local node="$REPO/scripts/ray_node.sh" head
    mapfile -t connect < <(worker_variables)
    if head="$(bash "$node" known head 2>/dev/null)"; then
        export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
        RAY_AUTH_TOKEN_PATH="$(bash "$node" folder)/token"
        connect+=("ray_kwargs.ray_init.address=$head" "++ray_kwargs.ray_init._node_ip_address=$(bash "$node" known address)")
    else
        connect+=(ray_kwargs.ray_init.address=auto)
    fi
}

# Run a command, and run it again, at most MAX_RESTARTS times, where it ends with 3 or 4: it lost a process, which may go
# well another time. After 4 it goes on from a checkpoint of its own, whatever it began with. A signal is passed on and
# ends the restarts. RESTART_COUNT in the environment is the number of restarts so far.
run_with_restarts() {
    local again=() child="" stopped="" passed status
    pass_on() { stopped="$1" passed=1; [[ -z "$child" ]] || kill -s "$1" "$child" 2>/dev/null || true; }
    trap 'pass_on TERM' TERM
    trap 'pass_on INT' INT
    set -m # a process group of its own, so that Ctrl-C does not reach it a second time
    export RESTART_COUNT
    for ((RESTART_COUNT = 0; ; RESTART_COUNT++)); do
        "$@" "${again[@]}" &
        child=$!
        if [[ -n "$stopped" ]]; then pass_on "$stopped"; fi # it came before there was a child
        passed=1
        while [[ -n "$passed" ]]; do # a trap ends the wait before the command does
            passed="" status=0
            wait "$child" || status=$?
        done
        child=""
        if [[ -n "$stopped" ]] || ((status != 3 && status != 4)); then
            exit "$status"
        elif ((RESTART_COUNT == MAX_RESTARTS)); then
            complain "given up after restart $RESTART_COUNT of MAX_RESTARTS=$MAX_RESTARTS"
            exit "$status"
        fi
        if ((status == 4)); then again=(trainer.resume_mode=auto); fi
        say "restart $((RESTART_COUNT + 1)) of MAX_RESTARTS=$MAX_RESTARTS" >&2
    done
}

# A command as a shell reads it back, an argument a line.
print_command() {
    local argument end
    while (($#)); do
        argument="$1" end=" \\"
        shift
        [[ "$argument" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || argument="${argument@Q}"
        (($#)) || end=''
        printf '%s%s\n' "$argument" "$end"
    done
}

main() {
    local hostfile=""
    case "${1:-}" in
        -h | --help) usage; exit 0 ;;
        "" | *=* | [+~-]*) ;;
        *) hostfile="$1"; shift ;;
    esac
    local name missing=()
    for name in BASE_MODEL TEACHER_MODEL DATASET_PARQUET; do
        [[ -n "${!name:-}" ]] || missing+=("$name")
    done
    ((${#missing[@]} == 0)) || die "${missing[*]} is not set; see --help"

    local python
    python="$(python_of_run)" || die "no Python environment; run deploy_env.sh, or set ENV_DIR"
    local connect=() ranks
    hostfile="$(find_hostfile "$hostfile")"
    read_hosts "$hostfile"
    ranks="$(ranks_per_host)"
    if ((${#HOSTS[@]} > 1)) || [[ -n "${HOST_TARGETS[0]}" ]]; then
        connect_to_cluster
    fi

    local output="${OUTPUT_DIR:-$PWD/outputs/on_policy_distill}"
    local settings=(
        algorithm.adv_estimator=on_policy_distill
        "algorithm.distill_adv_max_clip=${DISTILL_ADV_MAX:-5.0}"
        "algorithm.distill_adv_min_clip=${DISTILL_ADV_MIN:--30.0}"

        "data.train_files=$DATASET_PARQUET"
        "data.val_files=${VAL_PARQUET:-null}"
        data.max_prompt_length=10240
        data.max_response_length=2048
        data.train_batch_size=32
        data.filter_overlong_prompts=True
        data.enable_think=True
        data.think_mode=auto

        "actor_rollout_ref.model.path=$BASE_MODEL"
        "actor_rollout_ref.ref.model.path=$TEACHER_MODEL"
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.optim.lr=5e-6
        actor_rollout_ref.actor.clip_ratio_high=0.28
        actor_rollout_ref.actor.use_dynamic_bsz=True
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24000

        actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.gpu_memory_utilization=0.7
        "actor_rollout_ref.rollout.extend_vocab_start_token=${EXTEND_VOCAB_START_TOKEN:-null}"
        "actor_rollout_ref.rollout.mask_response_if_have_extend_token=${MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN:-False}"

        "trainer.n_gpus_per_node=$ranks"
        "trainer.nnodes=${#HOSTS[@]}"
        "trainer.default_local_dir=$output"
        trainer.project_name=on_policy_distill
        "trainer.logger=[console,file]"
        trainer.save_freq=50
        trainer.test_freq=50
        trainer.max_actor_ckpt_to_keep=3
        trainer.total_epochs=1
    )

    local command=("$python" -m recipe.onpolicy_distill.main_onpolicy_distill "${settings[@]}" "${connect[@]}" "$@")
    if [[ -n "${DRY_RUN:-}" ]]; then
        print_command "${command[@]}"
        # Beside the command, which may be read by a program.
        if [[ -r "$BASE_MODEL/config.json" && -r "$TEACHER_MODEL/config.json" ]]; then
            PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" \
                "$python" -m recipe.onpolicy_distill.plan "${settings[@]}" "$@" >&2 || true
        fi
        exit 0
    fi
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    MAX_RESTARTS="${MAX_RESTARTS:-0}"
    [[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS is not a number of restarts"
    ((MAX_RESTARTS == 0)) || run_with_restarts "${command[@]}"
    exec "${command[@]}"
}

main "$@"

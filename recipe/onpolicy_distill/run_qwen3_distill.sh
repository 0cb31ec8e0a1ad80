#!/usr/bin/env bash
# Distil a student whose vocabulary extends its teacher's.
#
#   BASE_MODEL=... TEACHER_MODEL=... DATASET_PARQUET=... bash run_qwen3_distill.sh [HOSTFILE] [HYDRA_OVERRIDES...]
#
# HOSTFILE names one machine a line. Without it, or if it names this machine alone, the run stays on this machine and
# starts Ray itself; for several machines start Ray on them first (init_ray_cluster.sh HOSTFILE). What follows goes to
# Hydra and wins over the settings below.
#
# Environment:
#   BASE_MODEL, TEACHER_MODEL, DATASET_PARQUET   student, teacher, training prompts (required)
#   VAL_PARQUET                                  validation prompts (default: none)
#   EXTEND_VOCAB_START_TOKEN                     first id that the teacher lacks (default: none)
#   MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN           train on nothing of a response that holds one (default: False)
#   DISTILL_ADV_MAX, DISTILL_ADV_MIN             bounds of the advantage (default: 5.0, -30.0)
#   N_GPUS_PER_NODE                              training ranks per machine (default: its GPUs, or 1)
#   OUTPUT_DIR                                   checkpoints and metrics (default: ./outputs/on_policy_distill)
#   ENV_DIR                                      Python environment (default: the active one, else .venv of the checkout)
#   DRY_RUN=1                                    print the command and stop
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

die() { printf 'run_qwen3_distill: error: %s\n' "$*" >&2; exit 2; }

usage() { sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

# Machines of a hostfile, one a line: comments, blank lines, duplicates and what follows the name are left out.
hosts_in() { sed 's/#.*//' "$1" | awk 'NF && !seen[$1]++ { print $1 }'; }

is_this_machine() {
    case "$1" in
        localhost | 127.0.0.1 | ::1 | "$(hostname)" | "$(hostname -s 2>/dev/null || hostname)") return 0 ;;
    esac
    hostname -I 2>/dev/null | tr ' ' '\n' | grep -qxF "$1"
}

python_of_run() {
    local env_dir="${ENV_DIR:-${VIRTUAL_ENV:-$REPO/.venv}}"
    if [[ -x "$env_dir/bin/python" ]]; then echo "$env_dir/bin/python"; else command -v python3 || command -v python; fi
}

gpus_here() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    echo "$((gpus > 0 ? gpus : 1))"
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

    local nnodes=1 connect=()
    if [[ -n "$hostfile" ]]; then
        [[ -f "$hostfile" ]] || die "hostfile $hostfile does not exist"
        local hosts=()
        mapfile -t hosts < <(hosts_in "$hostfile")
        ((${#hosts[@]})) || die "hostfile $hostfile names no host"
        if ((${#hosts[@]} > 1)) || ! is_this_machine "${hosts[0]}"; then
            nnodes=${#hosts[@]}
            connect=("ray_kwargs.ray_init.address=auto")
        fi
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

        "trainer.n_gpus_per_node=${N_GPUS_PER_NODE:-$(gpus_here)}"
        "trainer.nnodes=$nnodes"
        "trainer.default_local_dir=$output"
        trainer.project_name=on_policy_distill
        trainer.logger=[console,file]
        trainer.save_freq=50
        trainer.test_freq=50
        trainer.max_actor_ckpt_to_keep=3
        trainer.total_epochs=1
    )

    local python
    python="$(python_of_run)" || die "no Python environment; run deploy_env.sh, or set ENV_DIR"
    local command=("$python" -m recipe.onpolicy_distill.main_onpolicy_distill "${settings[@]}" "${connect[@]}" "$@")
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%s\n' "${command[@]}"
        exit 0
    fi
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    exec "${command[@]}"
}

main "$@"

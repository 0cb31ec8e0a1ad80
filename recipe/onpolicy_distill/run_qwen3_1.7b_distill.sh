#!/usr/bin/env bash
# run_qwen3_distill.sh with settings for a 1.7B student, which should fit a GPU of 80 GB (not measured): larger
# micro-batches, and a smaller share of each GPU for the engine.
#
#   BASE_MODEL=... TEACHER_MODEL=... DATASET_PARQUET=... bash run_qwen3_1.7b_distill.sh [HOSTFILE] [HYDRA_OVERRIDES...]
#
# Arguments and environment as there.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

SELF="${BASH_SOURCE[0]}"
[[ ! -L "$SELF" ]] || SELF="$(readlink -f "$SELF")"
HERE="$(cd "$(dirname "$SELF")" && pwd)"

main() {
    local hostfile=()
    case "${1:-}" in
        -h | --help) sed -n '2,/^[^#]/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        "" | *=* | [+~-]*) ;;
        *) hostfile=("$1"); shift ;;
    esac
    exec bash "$HERE/run_qwen3_distill.sh" "${hostfile[@]}" \
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=49152 \
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
        trainer.experiment_name=qwen3_1.7b \
        "$@"
}

main "$@"

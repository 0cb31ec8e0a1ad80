#!/usr/bin/env bash
# run_qwen3_distill.sh with settings for a student of 0.6 to 1.7 billion weights on one GPU of 12 to 24 GB, by the plan
# of its memory (docs/plan.md; not run on one): an adapter in place of all weights, so that the teacher `self` is the
# student without it and takes nothing; a teacher that waits in the machine's memory; short prompts and answers.
#
#   BASE_MODEL=... TEACHER_MODEL=... DATASET_PARQUET=... EXTEND_VOCAB_START_TOKEN=auto \
#       bash run_one_card.sh [HYDRA_OVERRIDES...]
#
# Environment as there; EXTEND_VOCAB_START_TOKEN (an id, or auto) is needed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

SELF="${BASH_SOURCE[0]}"
[[ ! -L "$SELF" ]] || SELF="$(readlink -f "$SELF")"
HERE="$(cd "$(dirname "$SELF")" && pwd)"

main() {
    case "${1:-}" in
        -h | --help) sed -n '2,/^[^#]/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    esac
    exec bash "$HERE/run_qwen3_distill.sh" \
        algorithm.distill.objective=exact \
        algorithm.distill.support=shared \
        data.max_prompt_length=2048 \
        data.max_response_length=512 \
        actor_rollout_ref.rollout.horizon=256 \
        actor_rollout_ref.model.lora_rank=32 \
        actor_rollout_ref.model.lora_alpha=64 \
        actor_rollout_ref.actor.optim.lr=1e-4 \
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096 \
        actor_rollout_ref.ref.fsdp_config.param_offload=True \
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
        actor_rollout_ref.rollout.weight_sync_bucket_mb=512 \
        trainer.n_gpus_per_node=1 \
        trainer.experiment_name=one_card \
        "$@"
}

main "$@"

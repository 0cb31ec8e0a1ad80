#!/usr/bin/env bash
# The settings of run_qwen3_distill.sh (see there for arguments and environment) for a 1.7B student: it fits one GPU of
# 80 GB, shares its embedding with its head, and takes larger micro-batches.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

main() {
    local hostfile=()
    case "${1:-}" in
        -h | --help) exec bash "$HERE/run_qwen3_distill.sh" --help ;;
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

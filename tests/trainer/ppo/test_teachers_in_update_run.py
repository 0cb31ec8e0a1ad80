"""Teachers that run in the update give the metrics and weights of a run that calls them in a stage before it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.in_process_run import MEASURED, run_in_process, settings
from support.launch import write_onerec_parquet

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
from verl.protocol import DataProto

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 3
OF_NO_ADVANTAGE = ("critic/advantages/", "critic/returns/")
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return len(set(solution_str)) / 8
"""
BESIDE_A_REWARD = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.distill.coef": 0.5,
    "actor_rollout_ref.rollout.n": 2,
    "actor_rollout_ref.rollout.top_p": 0.9,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "algorithm.rollout_correction.rollout_is": "token",
}


class ScoresBefore(RayOnPolicyDistillTrainer):
    """As it is where the update cannot run the teachers."""

    uses_reference = True  # type: ignore[assignment]
    uses_advantage = True  # type: ignore[assignment]


@pytest.fixture
def train(tiny_pair: Any, tmp_path: Path) -> Any:
    """Train with three teachers, scoring in a stage before the update or in it; returns metrics, weights, calls."""
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 12, sources=("general", "rec_next", "mixed"))
    (tmp_path / "reward.py").write_text(REWARD)
    values = {
        "actor_rollout_ref.actor.ppo_mini_batch_size": 3,
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "algorithm.distill.objective": "exact",
        "algorithm.distill.support": "shared",
        "++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*],weight:0.5}",
        "++algorithm.distill.teachers.both": "{vocabulary:stitched,sources:[mixed]}",
        "data.train_batch_size": 6,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
        "trainer.canary_tolerance": "null",
    }

    def of(scores_before: bool, **changes: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], list[str]]:
        folder, called = tmp_path / f"scores_before_{scores_before}", []
        if "algorithm.distill.coef" in changes:
            changes["custom_reward_function.path"] = tmp_path / "reward.py"

        def record(trainer: Any) -> None:
            if scores_before:
                trainer.__class__ = ScoresBefore
            score_with = trainer.score_with

            def noted(role: str, batch: DataProto) -> DataProto:
                called.append(role)
                return score_with(role, batch)

            trainer.score_with = noted

        run_in_process(settings(tiny_pair, prompts, folder, **values | changes), tamper=record)
        dist.destroy_process_group()
        lines = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors")
        return lines, weights, called

    return of


@pytest.mark.parametrize("changes", [{}, BESIDE_A_REWARD], ids=["divergence", "reward"])
def test_metrics_and_weights_are_those_of_a_run_that_scores_before(train: Any, changes: dict[str, Any]) -> None:
    updated, weights, called = train(False, **changes)
    before, right, called_before = train(True, **changes)
    assert (len(called), len(called_before)) == (0, 3 * STEPS)
    assert all(torch.equal(value, right[name]) for name, value in weights.items())
    for step, expected in zip(updated, before, strict=True):
        timed, timed_before = (
            {name.removeprefix("timing_s/") for name in metrics if name.startswith("timing_s/")}
            for metrics in (step, expected)
        )
        assert timed_before - timed == ({"ref"} if changes is BESIDE_A_REWARD else {"ref", "adv"})
        metrics = {
            name: value
            for name, value in expected.items()
            if not name.startswith(MEASURED) and (changes is BESIDE_A_REWARD or not name.startswith(OF_NO_ADVANTAGE))
        }
        got = {name: value for name, value in step.items() if not name.startswith(MEASURED)}
        assert got == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for name in ("distill/reverse_kl", "distill/mixed/reverse_kl", "distill_teacher/both/reverse_kl"):
        assert abs(updated[-1][name]) > 1e-3
    assert ("critic/advantages/mean" in updated[0]) == (changes is BESIDE_A_REWARD)
    assert not any(name.endswith(("extend_adv_share", "adv_clipfrac_low")) for name in updated[0])
    assert ("rollout_corr/rollout_is_mean" in updated[0]) == (changes is BESIDE_A_REWARD)

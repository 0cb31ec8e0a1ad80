"""A run that hears its teachers in the update is the run that asks them in a stage of its own, at half the calls."""

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
BY_ROWS = {"actor_rollout_ref.actor.use_dynamic_bsz": False, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1}


class AsksBefore(RayOnPolicyDistillTrainer):
    """As it is where the update cannot run the teachers."""

    uses_reference = True  # type: ignore[assignment]
    uses_advantage = True  # type: ignore[assignment]


@pytest.fixture
def train(tiny_pair: Any, tmp_path: Path) -> Any:
    """Train over three sources with a teacher each, asking before or not; returns figures, weights and calls."""
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

    def of(asks_before: bool, **changes: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], list[str]]:
        folder, asked = tmp_path / f"asks_before_{asks_before}", []
        if "algorithm.distill.coef" in changes:
            changes["custom_reward_function.path"] = tmp_path / "reward.py"

        def listen(trainer: Any) -> None:
            if asks_before:
                trainer.__class__ = AsksBefore
            ask = trainer.ask_teacher

            def noted(role: str, batch: DataProto) -> DataProto:
                asked.append(role)
                return ask(role, batch)

            trainer.ask_teacher = noted

        run_in_process(settings(tiny_pair, prompts, folder, **values | changes), tamper=listen)
        dist.destroy_process_group()
        lines = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors")
        return lines, weights, asked

    return of


@pytest.mark.parametrize("changes", [{}, BY_ROWS, BESIDE_A_REWARD], ids=["tokens", "rows", "reward"])
def test_figures_and_weights_are_those_of_a_run_that_asks_before(train: Any, changes: dict[str, Any]) -> None:
    heard, weights, asked = train(False, **changes)
    before, right, asked_before = train(True, **changes)
    assert (len(asked), len(asked_before)) == (0, 3 * STEPS)
    assert all(torch.equal(value, right[name]) for name, value in weights.items())
    for step, expected in zip(heard, before, strict=True):
        timed, timed_before = (
            {name.removeprefix("timing_s/") for name in figures if name.startswith("timing_s/")}
            for figures in (step, expected)
        )
        assert timed_before - timed == ({"ref"} if changes is BESIDE_A_REWARD else {"ref", "adv"})
        figures = {
            name: value
            for name, value in expected.items()
            if not name.startswith(MEASURED) and (changes is BESIDE_A_REWARD or not name.startswith(OF_NO_ADVANTAGE))
        }
        got = {name: value for name, value in step.items() if not name.startswith(MEASURED)}
        assert got == pytest.approx(figures, rel=1e-4, abs=1e-5)
    for name in ("distill/reverse_kl", "distill/mixed/reverse_kl", "distill_teacher/both/reverse_kl"):
        assert abs(heard[-1][name]) > 1e-3
    assert ("critic/advantages/mean" in heard[0]) == (changes is BESIDE_A_REWARD)
    assert not any(name.endswith(("extend_adv_share", "adv_clipfrac_low")) for name in heard[0])
    assert ("rollout_corr/rollout_is_mean" in heard[0]) == (changes is BESIDE_A_REWARD)

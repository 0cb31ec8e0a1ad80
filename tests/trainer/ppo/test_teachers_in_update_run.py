"""What the update's own pass scores gives the metrics and weights of a run that scores in stages before it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import run_in_process, settings
from support.launch import metrics_by_step, write_onerec_parquet

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 2
OF_NO_ADVANTAGE = ("critic/advantages/", "critic/returns/")


class ScoresBefore(RayOnPolicyDistillTrainer):
    """As it is where the update's own pass cannot score."""

    uses_reference = uses_advantage = True  # type: ignore[assignment]


def train(scores_before: bool, mini_batch: int, epochs: int, pair: Any, prompts: Path, folder: Path) -> Any:
    """Train with three teachers, scoring in stages before the update or in it; returns metrics, weights, calls."""
    values = {
        "actor_rollout_ref.actor.ppo_mini_batch_size": mini_batch,
        "actor_rollout_ref.actor.ppo_epochs": epochs,
        "algorithm.distill.objective": "exact",
        "algorithm.distill.support": "shared",
        "++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*],weight:0.5}",
        "++algorithm.distill.teachers.both": "{vocabulary:stitched,sources:[mixed]}",
        "data.train_batch_size": 6,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
        "trainer.canary_tolerance": "null",
    }
    called: list[str] = []

    def record(trainer: Any) -> None:
        if scores_before:
            trainer.__class__ = ScoresBefore
        score_with, score_student = trainer.score_with, trainer.actor_wg.compute_log_prob
        trainer.score_with = lambda role, batch: (called.append(role), score_with(role, batch))[1]
        trainer.actor_wg.compute_log_prob = lambda batch: (called.append("actor"), score_student(batch))[1]

    run_in_process(settings(pair, prompts, folder, **values), tamper=record)
    model = folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors"
    return metrics_by_step(folder, STEPS), load_file(model), called


@pytest.mark.parametrize(("mini_batch", "epochs"), [(6, 1), (3, 2)])
def test_metrics_and_weights_are_those_of_a_run_that_scores_before(
    mini_batch: int, epochs: int, tiny_pair: Any, tmp_path: Path
) -> None:
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 12, sources=("general", "rec_next", "mixed"))
    given = mini_batch, epochs, tiny_pair, prompts
    updated, weights, called = train(False, *given, tmp_path / "updated")
    before, right, called_before = train(True, *given, tmp_path / "before")
    # Of later optimizer steps the update's pass would be over other weights than those that wrote.
    assert (called, len(called_before)) == (["actor"] * (0 if epochs == 1 else STEPS), 4 * STEPS)
    assert all(torch.equal(value, right[name]) for name, value in weights.items())
    for step, found in before.items():
        expected = {name: value for name, value in found.items() if not name.startswith(OF_NO_ADVANTAGE)}
        assert updated[step] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for name in ("distill/reverse_kl", "distill/mixed/reverse_kl", "distill_teacher/both/reverse_kl"):
        assert abs(updated[STEPS][name]) > 1e-3

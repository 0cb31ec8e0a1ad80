"""Runs whose engines write the next batch while one trains, on a real Ray: beside ranks and in a pool of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.file_faults import Killed, killed_in_step
from support.in_process_run import settings
from support.launch import OVERLAP, launch, metrics_by_step, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.config import PPOConfig
from verl.trainer.launch.run import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 4
APART = {"trainer.rollout_nnodes": 1, "trainer.rollout_n_gpus_per_node": 2}
ALL_APART = {**APART, "trainer.teacher_nnodes": 1, "trainer.teacher_n_gpus_per_node": 1}
ALL_APART |= {"trainer.rollout_weight_sync": "broadcast"}


def train(config: PPOConfig, dies_in_step: int | None = None) -> None:
    trainer = killed_in_step(build_trainer(config), dies_in_step)
    if dies_in_step is None:
        run(trainer)
        return
    with pytest.raises(Killed):
        run(trainer)


@pytest.mark.parametrize(("objective", "pools", "tolerance"), [("exact", APART, 0.0), ("sampled", ALL_APART, 1e-5)])
def test_a_run_killed_with_a_batch_in_flight_goes_on_as_the_run_that_never_was_wherever_its_engines_are(
    tiny_pair: Pair, tmp_path: Path, objective: str, pools: dict[str, Any], tolerance: float
) -> None:
    """The whole run has engines beside its rank; the one that is killed has them in a pool of their own.

    With weights by gloo, and a teacher in a third, which scores the answers as they come: micro-batches are others, and
    so is rounding.
    """
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 9)
    changes = {
        "ray_kwargs.ray_init.num_cpus": 2,
        "trainer.total_training_steps": STEPS,
        "trainer.max_staleness": 1,
        "trainer.async_save": False,
        "actor_rollout_ref.rollout.agent.num_workers": 2,
        "algorithm.distill.objective": objective,
    }
    whole = settings(tiny_pair, prompts, tmp_path / "whole", **changes)
    stopped = settings(tiny_pair, prompts, tmp_path / "stopped", **changes, **pools)
    train(whole)
    train(stopped, dies_in_step=3)
    assert (tmp_path / "stopped" / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    train(stopped)
    expected = metrics_by_step(tmp_path / "whole", STEPS)
    got = metrics_by_step(tmp_path / "stopped", STEPS)
    assert all(got[step] == pytest.approx(expected[step], rel=tolerance, abs=tolerance) for step in expected)
    assert [expected[step]["staleness/max"] for step in expected] == [0, 1, 1, 1]
    last = f"global_step_{STEPS}/actor/huggingface/model.safetensors"
    weights = load_file(tmp_path / "whole" / last)
    for name, value in load_file(tmp_path / "stopped" / last).items():
        torch.testing.assert_close(value, weights[name], rtol=tolerance, atol=tolerance)


def test_vllm_in_a_pool_of_its_own_learns_one_step_behind(tiny_pair: Pair, tmp_path: Path) -> None:
    steps = 10
    changes = {
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "data.max_response_length": 32,
        "data.train_batch_size": 16,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.weight_sync_bucket_mb": 1,
        "algorithm.distill.objective": "exact",
        "data.val_files": write_onerec_parquet(tmp_path / "val.parquet", 32),
        "trainer.device": "cpu",
        **OVERLAP,
        "trainer.save_freq": -1,
        "trainer.test_freq": steps,
        "trainer.timeline": True,
        "trainer.val_before_train": True,
    }
    env = script_env(tiny_pair, write_onerec_parquet(tmp_path / "train.parquet", 16 * steps))
    done = launch(tmp_path / "run", small_run("vllm", 1, steps, **changes), env)
    assert "pool rollout: 1 rank(s) on 1 node(s)" in done.output and "biased:" not in done.output
    assert done.series("staleness/max") == [0] + [1] * (steps - 1)
    before, after = done.series("val/reverse_kl")
    assert after < before
    gaps = done.series("training/rollout_log_probs_diff_max")
    assert gaps[0] < 1e-4, "the first batch is written by the weights that it trains"
    assert min(gaps[1:]) > 1e-3, "later ones by those before the last update"
    assert len(done.series("rollout_corr/kl")) == steps
    # One of each step's answers: written while the step before it was in its update.
    events = json.loads((tmp_path / "run" / "timeline.json").read_text().rstrip(",\n") + "]")
    spans = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    updates = [span for span in spans if span[0] == "update_actor"]
    for step in range(2, steps + 1):
        [(_, began, _)] = [span for span in spans if span[0] == f"answers of step {step}"]
        assert began < updates[step - 2][2], "begun before the update before it ended"

"""Whole runs in which something breaks: what is skipped, what ends the run, what is safe, and that a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_process_run import run_in_process, settings
from support.launch import series, write_onerec_parquet

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.trainer.ppo.guards import GuardError
from verl.weight_sync import named_weights

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS, UPDATES = 4, 2
"""Steps of a run, and updates of a step."""
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"


@pytest.fixture
def config(tiny_pair: Any, tmp_path: Path) -> Callable[..., PPOConfig]:
    train = write_onerec_parquet(tmp_path / "train.parquet", 9)

    def build(**trainer: Any) -> PPOConfig:
        changes = {f"trainer.{name}": value for name, value in trainer.items()}
        length = {"trainer.total_training_steps": STEPS, LOG_PROBS: True, "actor_rollout_ref.rollout.temperature": 0.8}
        return settings(tiny_pair, train, tmp_path, **{**length, **changes})

    return build


def spoil_advantages(trainer: Any) -> None:
    """One advantage in every mini-batch that is no number, from step 2 on."""
    advantage = trainer.advantage

    def spoilt(batch: DataProto) -> DataProto:
        result = advantage(batch)
        if trainer.global_steps > 1:
            result.tensor("advantages")[:, 0] = float("nan")
        return result

    trainer.advantage = spoilt


def nudge_teacher_in_step_3(trainer: Any) -> None:
    generate = trainer.generate

    def nudging(batch: DataProto) -> DataProto:
        if trainer.global_steps == 3:
            nudge_teacher(trainer)
        return generate(batch)

    trainer.generate = nudging


@torch.no_grad()
def nudge_teacher(trainer: Any) -> None:
    """Change one matrix of the teacher by a tenth."""
    module = trainer.role_groups["ref"]._worker.model.module
    named_weights(module)["model.layers.1.mlp.up_proj.weight"].mul_(1.1)


def test_an_untouched_run_passes_every_guard(config: Any, tmp_path: Path, caplog: Any) -> None:
    run_in_process(config(max_skipped_updates=0, canary_tolerance=0, engine_gap_bound=1e-4))
    assert series(tmp_path, "distill/teacher_canary") == [0] * STEPS, "equal to the bit"
    assert series(tmp_path, "actor/updates") == [UPDATES] * STEPS
    assert series(tmp_path, "actor/skipped_updates") == [0] * STEPS
    assert all(0 < gap < 1e-4 for gap in series(tmp_path, "distill/engine_gap"))
    assert series(tmp_path, "distill/engine_gap") == series(tmp_path, "training/rollout_log_probs_diff_mean")
    assert series(tmp_path, "distill/engine_gap_exceeded") == [0] * STEPS
    assert not [record for record in caplog.records if record.name.startswith("verl.trainer.ppo.guards")]


def test_a_run_that_only_skips_ends(config: Any, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"updates of step 3 .*; 4 of this run so far, .*max_skipped_updates=3"):
        run_in_process(config(max_skipped_updates=3), tamper=spoil_advantages)
    assert (tmp_path / "global_step_3/manifest.json").exists(), "the one that was being written"
    assert series(tmp_path, "actor/skipped_updates") == [0, 2, 2], "the step that ended the run is logged too"
    run_in_process(config(max_skipped_updates=3))
    assert series(tmp_path, "actor/skipped_updates") == [0, 2, 2, 0], "and the run goes on, with a count of its own"


def test_a_teacher_that_changes_between_checkpoints_ends_the_run(config: Any, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"^teacher 'ref' at step 3 scores otherwise"):
        run_in_process(config(canary_tolerance=1e-3), tamper=nudge_teacher_in_step_3)
    assert series(tmp_path, "actor/updates") == [2, 2, 2]
    assert [path.name for path in tmp_path.glob("global_step_[23]*")] == ["global_step_2"]
    with pytest.raises(GuardError, match=r"^teacher 'ref' at step 2 scores otherwise"):
        # The same wrong weights from the start: only the checkpoint knows what is right.
        run_in_process(config(canary_tolerance=1e-3), tamper=nudge_teacher)
    run_in_process(config(canary_tolerance=1e-3))
    assert series(tmp_path, "training/global_step") == [1, 2, 3, 4]

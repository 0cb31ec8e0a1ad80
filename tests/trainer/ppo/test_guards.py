"""What ends a run, what is only said, and what neither: on figures written by hand."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.checkpoint.layout import DataState
from verl.trainer.checkpoint.saver import CheckpointSaver
from verl.trainer.ppo.guards import EngineGap, GuardError, SkippedUpdates
from verl.utils.save_outcome import SaveOutcome


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    return PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder), save_freq=1, **trainer))


class Watched:
    """Skipped updates of a run, step after step."""

    def __init__(self, config: PPOConfig) -> None:
        self.saver = CheckpointSaver(config, {})
        self.guard = SkippedUpdates(config, self.saver)
        self.step = 0

    def take(self, taken: int, skipped: int) -> None:
        self.step += 1
        loss = math.nan if skipped else 0.25
        counts = {"actor/updates": float(taken), "actor/skipped_updates": float(skipped)}
        self.guard.check({**counts, "actor/loss": loss, "actor/lr": 1e-3, "distill/reverse_kl": loss}, self.step)


# ------------------------------------------------------------------ skipped updates


@pytest.mark.parametrize(("limit", "survives"), [(0, 0), (1, 1), (3, 3)])
def test_a_run_that_takes_no_update_ends_behind_the_limit(tmp_path: Path, limit: int, survives: int) -> None:
    run = Watched(make_config(tmp_path, max_skipped_updates=limit))
    for _ in range(survives):
        run.take(0, 1)
    with pytest.raises(GuardError, match=rf"trainer\.max_skipped_updates={limit} allows"):
        run.take(0, 1)


def test_several_updates_of_one_step_count_each(tmp_path: Path) -> None:
    run = Watched(make_config(tmp_path, max_skipped_updates=3))
    run.take(0, 2)
    with pytest.raises(GuardError, match=r"2 of the 2 updates of step 2 .*; 4 of this run so far"):
        run.take(0, 2)


def test_ten_updates_make_up_for_one_that_is_skipped(tmp_path: Path) -> None:
    """One in eleven goes on for ever, one in ten does not: it owes a tenth of a skip more each time."""
    run = Watched(make_config(tmp_path, max_skipped_updates=2))
    for _ in range(1000):
        run.take(0, 1)
        run.take(10, 0)
    assert run.guard._excess_skips == 0
    skips = 0
    with pytest.raises(GuardError):
        while skips < 100:
            skips += 1
            run.take(0, 1)
            run.take(9, 0)
    # Tenths owed at the k-th: 10 + (k - 1); more than 20 end the run.
    assert skips == 12


def test_the_error_says_which_step_which_figures_what_was_last_right_and_what_is_safe(tmp_path: Path) -> None:
    run = Watched(make_config(tmp_path, max_skipped_updates=0))
    run.take(1, 0)
    run.saver.save(Slow(), 1, DataState(None, 0, 8, 4, 0, 0.0), last=False)
    assert not (tmp_path / "global_step_1").exists()
    with pytest.raises(GuardError) as stop:
        run.take(0, 1)
    text = str(stop.value)
    assert text.startswith("1 of the 1 updates of step 2 had a loss or gradient that is not finite")
    assert "(actor/loss=nan)" in text and "step 1 took one" in text
    assert text.endswith(f"{tmp_path / 'global_step_1'} is whole and safe"), "it was still being written"


class Slow:
    """A rank whose checkpoint is written when somebody waits for it."""

    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        (Path(local_path) / "model").write_text("x")

    def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
        return [SaveOutcome(done=wait, seconds=1.0)]


def test_a_checkpoint_that_fails_at_the_end_does_not_hide_the_cause(tmp_path: Path) -> None:
    run = Watched(make_config(tmp_path, max_skipped_updates=0))

    class Full(Slow):
        def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
            return [SaveOutcome(done=wait, error="no space")]

    run.saver.save(Full(), 1, DataState(None, 0, 8, 4, 0, 0.0), last=False)
    with pytest.raises(GuardError, match=r"^1 of the 1 updates .* there is no whole checkpoint yet$"):
        run.take(0, 1)


def test_without_a_limit_the_run_goes_on_and_says_so_ever_more_rarely(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Watched(make_config(tmp_path, max_skipped_updates=None))
    for _ in range(100):
        run.take(0, 1)
    assert len(caplog.records) == 7, "at 1, 2, 4, 8, 16, 32, 64"


def test_steps_without_counts_are_not_watched(tmp_path: Path) -> None:
    SkippedUpdates(make_config(tmp_path, max_skipped_updates=0), CheckpointSaver(make_config(tmp_path), {})).check(
        {"actor/loss": math.nan}, 1
    )


# ------------------------------------------------------------------ the engine


def gaps(guard: EngineGap, *values: float) -> list[dict[str, float]]:
    return [
        guard.watch({"training/rollout_log_probs_diff_mean": v, "training/rollout_log_probs_diff_max": 3 * v}, step)
        for step, v in enumerate(values, 1)
    ]


def test_a_gap_is_said_once_and_again_when_it_has_doubled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = EngineGap(make_config(tmp_path, engine_gap_bound=0.1))
    with caplog.at_level(logging.WARNING):
        figures = gaps(guard, 0.02, 0.1, 0.15, 0.16, 0.29, 0.31, 0.2, math.nan, math.nan, 0.05)
    assert [figure["distill/engine_gap"] for figure in figures[:4]] == [0.02, 0.1, 0.15, 0.16]
    exceeded = [figure["distill/engine_gap_exceeded"] for figure in figures]
    assert exceeded == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0], "the bound itself is within it, what is no number beyond"
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == ["step 3", "step 6", "step 8"]
    assert "0.15 nats on average (at most 0.45), above trainer.engine_gap_bound=0.1; so far in 1 steps" in said[0]
    assert "so far in 4 steps" in said[1]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.95, -1), (1.0, 200)])
def test_a_sampler_that_cuts_its_tail_is_another_distribution(tmp_path: Path, top_p: float, top_k: int) -> None:
    config = make_config(tmp_path)
    config.actor_rollout_ref.rollout.top_p, config.actor_rollout_ref.rollout.top_k = top_p, top_k
    assert gaps(EngineGap(config), 5.0) == [{}]


def test_without_a_bound_it_is_measured_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert gaps(EngineGap(make_config(tmp_path, engine_gap_bound=None)), 5.0) == [{"distill/engine_gap": 5.0}]
    assert EngineGap(make_config(tmp_path)).watch({"actor/loss": 1.0}, 1) == {}
    assert not caplog.records


@pytest.mark.parametrize("name", ["max_skipped_updates", "canary_tolerance", "engine_gap_bound"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_limits_below_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{name}={value} must be (at least 0|a whole number), or null"):
        TrainerConfig(**{name: value})

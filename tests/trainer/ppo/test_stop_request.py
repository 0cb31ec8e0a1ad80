"""SIGTERM and Ctrl-C at every stage of a step: the step is finished and saved, and the resumed run is the whole one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loop_fakes import Prompts, make_config, make_trainer

from verl.trainer.ppo.stop_request import StopRequest

STEPS = 4
STAGES = "generate", "old_log_prob", "advantage", "update_actor", "sync_weights", "score_validation", "save_checkpoint"


@pytest.fixture
def listening() -> Iterator[Callable[[float], StopRequest]]:
    """Makes requests that listen, and gives the signals back."""
    made: list[StopRequest] = []

    def listen(grace_s: float = 60.0) -> StopRequest:
        made.append(StopRequest(grace_s))
        made[-1].listen()
        return made[-1]

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield listen
    for stop in made:
        stop.restore()
    assert {number: signal.getsignal(number) for number in before} == before


def trainer_of(folder: Path, **trainer: Any) -> tuple[Any, list[str]]:
    settings = {"save_freq": 2, "test_freq": 1, "total_training_steps": STEPS, **trainer}
    made, log = make_trainer(make_config(folder, **settings), val_dataset=Prompts(4))
    made.config.trainer.val_before_train = True
    return made, log


def signals_in(trainer: Any, method: str, step: int, number: signal.Signals) -> None:
    """Have the stage send this process a signal, as it begins, in one step."""
    original = getattr(trainer, method)

    def stage(*arguments: Any) -> Any:
        if trainer.global_steps == step:
            setattr(trainer, method, original)
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(trainer, method, stage)


def metrics_of(lines: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Without what the clock says, and what only a step that saves has."""
    left_out = ("timing", "perf/", "distill/teacher_canary")
    return [(step, {k: v for k, v in data.items() if not k.startswith(left_out)}) for step, data in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_in_any_stage_ends_the_run_after_its_step_and_nothing_is_lost(
    tmp_path: Path, listening: Callable[..., StopRequest], stage: str
) -> None:
    whole, _ = trainer_of(tmp_path / "whole")
    whole.fit()
    step = 2 if stage == "save_checkpoint" else 1  # no checkpoint is due at step 1
    stopped, log = trainer_of(tmp_path / "run")
    stop = listening()
    signals_in(stopped, stage, step, signal.SIGTERM)
    stopped.fit(stop)
    assert stopped.global_steps == step
    assert stop.requested and stop.exit_code == 143
    assert log[-1] == f"save {step}"
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == f"{step}\n"

    resumed, _ = trainer_of(tmp_path / "run")
    resumed.fit()
    assert resumed.logger.truncated_after == [step]
    assert metrics_of(stopped.logger.lines + resumed.logger.lines) == metrics_of(whole.logger.lines)


def test_the_same_signal_within_a_second_counts_once(tmp_path: Path, listening: Callable[..., StopRequest]) -> None:
    """A launch script passes on what a scheduler has sent to every process; without ``save_freq`` nothing is saved."""
    trainer, log = trainer_of(tmp_path, save_freq=-1)
    stop = listening()
    signals_in(trainer, "old_log_prob", 1, signal.SIGINT)
    signals_in(trainer, "ref_log_prob", 1, signal.SIGINT)
    trainer.fit(stop)
    assert trainer.global_steps == 1 and stop.exit_code == 130
    assert not [event for event in log if event.startswith("save")]


@pytest.mark.parametrize(
    ("first", "another"), [(("old_log_prob", 1), ("ref_log_prob", 1)), (("score_validation", 0), ("old_log_prob", 1))]
)
def test_another_signal_or_one_before_the_first_step_leaves_at_once(
    tmp_path: Path, listening: Callable[..., StopRequest], first: tuple[str, int], another: tuple[str, int]
) -> None:
    trainer, log = trainer_of(tmp_path)
    stop = listening()
    signals_in(trainer, *first, signal.SIGTERM)
    signals_in(trainer, *another, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(stop)
    assert "update" not in log
    assert stop.name == "SIGTERM", "the first one decides the exit code"


def test_the_end_of_the_grace_leaves_at_once(tmp_path: Path, listening: Callable[..., StopRequest]) -> None:
    trainer, log = trainer_of(tmp_path)
    trainer.config.trainer.val_before_train = False
    signals_in(trainer, "old_log_prob", 1, signal.SIGTERM)
    trainer.ref_log_prob = lambda _: time.sleep(30)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(listening(0.2))
    assert "update" not in log


def test_while_the_run_ends_signals_change_nothing(listening: Callable[..., StopRequest]) -> None:
    stop = listening()
    stop.leave()
    signal.raise_signal(signal.SIGTERM)
    assert not stop.requested

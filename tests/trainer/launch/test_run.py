"""How runs end: exit codes, and what is reported first. The trainer is a fake."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl.config import PPOConfig, TrainerConfig
from verl.config.best_rule import MetricRuleError
from verl.single_controller.base import RolloutError, WorkerError
from verl.single_controller.ray.session import end_session
from verl.trainer.checkpoint.saver import CheckpointError
from verl.trainer.launch import run as module
from verl.trainer.ppo.guards import GuardError
from verl.trainer.ppo.stop_request import StopRequest
from verl.utils.tracking import LoggerError


class Trainer:
    """Ends with the last step, or with a signal in step 5, then with an error where it has one."""

    def __init__(self, config: PPOConfig, sent: int | None, error: Exception | None, saved_any: bool) -> None:
        self.config, self.sent, self.error = config, sent, error
        self.saver = SimpleNamespace(saved_any=saved_any, finish=lambda: self.finished.append(self.global_steps))
        self.finished: list[int] = []
        self.global_steps, self.total_steps = 0, 9

    def init_workers(self) -> None:
        if type(self.error) is ValueError:
            raise self.error

    def fit(self, stop: StopRequest) -> None:
        stop.takes_steps = True
        if self.sent is not None:
            os.kill(os.getpid(), self.sent)
        self.global_steps = 9 if self.sent is None else 5
        if self.error is not None:
            raise self.error

    def shutdown(self) -> None:
        print("shut down", file=sys.stderr)
        raise OSError("the last metrics cannot be written")


@pytest.fixture
def end_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[str]]]:
    """Runs a trainer that ends so; returns its exit code and what it wrote to the console."""

    def end_of(
        sent: int | None = None, error: Exception | None = None, saved_any: bool = False, start: Any = print, **run: Any
    ) -> tuple[int, list[str]]:
        monkeypatch.setattr(module, "start_session", start)
        monkeypatch.setattr(module, "progress", lambda trainer: f"step {trainer.global_steps} of 9")
        monkeypatch.setattr(module, "end_session", lambda folder: print("Ray ended", file=sys.stderr))
        config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(tmp_path), **run))
        trainer: Any = Trainer(config, sent, error, saved_any)
        code: Any = 0
        try:
            module.run(trainer)
        except SystemExit as exit_:
            code = exit_.code
        *output, shut_down, ended = capsys.readouterr().err.splitlines()
        assert (shut_down, ended) == ("shut down", "Ray ended")
        return code, output

    return end_of


DIED = "actor.update failed on rank 1 of 2, node 10.0.0.1: the process died\nlog: /logs/x.err"


def test_a_run_that_reaches_its_last_step(end_of: Callable[..., Any], tmp_path: Path) -> None:
    assert end_of() == (0, [])
    assert (tmp_path / "config.yaml").is_file()
    end_of(val_only=True, total_training_steps=7)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "that of the run which is validated"


@pytest.mark.parametrize(
    ("error", "saved_any", "code"),
    [
        (WorkerError(DIED), False, 3),
        (RolloutError(DIED), True, 4),
        (WorkerError(DIED, by_user=True), True, 1),
        (CheckpointError(DIED), True, 1),
        (GuardError(DIED), True, 1),
        (MetricRuleError(DIED), True, 1),
        (LoggerError(DIED), True, 1),
    ],
)
def test_a_failure_is_reported_before_anything_is_shut_down(
    end_of: Callable[..., Any], error: Exception, saved_any: bool, code: int
) -> None:
    """3 and 4 are for what may go well another time."""
    cause, log = DIED.splitlines()
    assert end_of(error=error, saved_any=saved_any) == (code, [f"error: {cause}", log, "step 9 of 9"])


@pytest.mark.parametrize("error", [WorkerError(DIED), RolloutError(DIED), LoggerError(DIED), TypeError("no score")])
def test_a_checkpoint_that_is_being_written_is_finished_where_ranks_are_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(module, "start", print)
    monkeypatch.setattr(module, "progress", lambda trainer: f"step 9, newest checkpoint {trainer.finished}")
    trainer: Any = Trainer(PPOConfig(), None, error, False)
    ends = TypeError if isinstance(error, TypeError) else SystemExit
    with pytest.raises(ends):
        module.run_once(trainer, StopRequest())
    shown = "TypeError: no score" if ends is TypeError else f"error: {DIED}"
    newest = [] if type(error) is WorkerError else [9]
    assert capsys.readouterr().err == f"{shown}\nstep 9, newest checkpoint {newest}\n"


def test_what_the_cluster_or_a_setting_does_not_allow(end_of: Callable[..., Any]) -> None:
    assert end_of(error=ValueError("key=9 is too much")) == (1, ["error: key=9 is too much"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_exit_code(end_of: Callable[..., Any], number: signal.Signals) -> None:
    assert end_of(number) == (128 + number, [f"stopped by {number.name}: step 5 of 9"])
    assert end_of(number, WorkerError(DIED))[0] == 128 + number, "in the step that it waits for"


@pytest.mark.parametrize("handler", [signal.raise_signal, sys.exit], ids=["ours", "Ray's, while it starts"])
def test_a_signal_during_the_start_leaves_at_once(end_of: Callable[..., Any], handler: Callable[[int], None]) -> None:
    ended = end_of(start=lambda ray_init: handler(int(signal.SIGTERM)))
    assert ended == (143, ["left at once at SIGTERM: step 0 of 9"])


def test_a_cluster_decides_what_the_trainer_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = Trainer(PPOConfig(trainer=TrainerConfig(device="cuda")), None, None, False)
    trainer.config.ray_kwargs.ray_init = {"address": "10.0.0.1:6379"}
    monkeypatch.setattr(module, "start_session", print)
    monkeypatch.setattr(module, "cluster_device", lambda setting: setting)
    module.start(trainer, StopRequest())
    assert trainer.device_name == "cuda"
    trainer.config.trainer.max_staleness = 1  # with engines that free their memory: refused once the device is known
    with pytest.raises(SystemExit, match="1"):
        module.start(trainer, StopRequest())


def test_a_timeline_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    ended: list[int] = []
    calls: dict[str, Any] = {"is_initialized": lambda: True, "shutdown": lambda: ended.append(1), "timeline": print}
    for name, call in calls.items():
        monkeypatch.setattr(f"verl.single_controller.ray.session.ray.{name}", call)
    end_session("/dev/null/folder")
    assert ended == [1] and "Ray's timeline cannot be written to /dev/null/folder" in caplog.text

"""How runs end: exit codes, what is said first, restarts and when there are none. Trainers fail as they are told."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TrainerConfig
from verl.experimental.agent_loop.base import RolloutError
from verl.single_controller.base import WorkerError
from verl.trainer.checkpoint.best import BestMetricError
from verl.trainer.checkpoint.layout import seal
from verl.trainer.checkpoint.saver import CheckpointError
from verl.trainer.launch import run as module
from verl.trainer.launch.run import run
from verl.trainer.ppo.guards import GuardError


class Saver:
    def __init__(self, saved_any: bool) -> None:
        self.saved_any = saved_any


class Trainer:
    """Ends its attempt with the next of ``ends``: None for the last step, an exception, or a signal at some step."""

    def __init__(self, config: PPOConfig, ends: list[Any], events: list[str], *, saved_any: bool = True) -> None:
        self.config, self.ends, self.events = config, ends, events
        self.saver = Saver(saved_any)
        self.global_steps, self.total_steps = 0, 9
        self.stop: Any = None
        self.restarts = -1

    def init_workers(self) -> None:
        self.events.append(f"start {self.restarts} {self.config.trainer.resume_mode}")
        if isinstance(self.ends[0], ValueError):
            raise self.ends.pop(0)

    def fit(self) -> None:
        self.stop.takes_steps = True
        end = self.ends.pop(0)
        if isinstance(end, signal.Signals):
            os.kill(os.getpid(), end)
            self.global_steps = 5
        elif end is not None:
            raise end
        else:
            self.global_steps = 9

    def progress(self) -> str:
        return f"step {self.global_steps} of 9"

    def shutdown(self) -> None:
        self.events.append("shutdown")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sessions that are only noted."""
    sessions: list[str] = []
    monkeypatch.setattr(module, "start_session", lambda ray_init: sessions.append("start"))
    monkeypatch.setattr(module, "end_session", lambda folder: sessions.append("end"))
    return sessions


def end_of(folder: Path, ends: list[Any], events: list[str], **options: Any) -> int:
    """Exit code of a run whose attempts end so."""
    saved_any = options.pop("saved_any", True)
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder), **options))
    folder.mkdir(parents=True, exist_ok=True)

    def build() -> Any:
        events.append("build")
        return Trainer(config, ends, events, saved_any=saved_any)

    try:
        run(build(), build)
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


DIED = WorkerError("actor.update failed on rank 1 of 2, node 10.0.0.1: the process died\nlog: /logs/x.err")


def test_a_run_that_reaches_its_last_step(tmp_path: Path, no_ray: list[str]) -> None:
    events: list[str] = []
    assert end_of(tmp_path, [None], events) == 0
    assert events == ["build", "start 0 auto", "shutdown"]
    assert no_ray == ["start", "end"]
    assert (tmp_path / "config.yaml").is_file()


def test_a_failure_is_said_before_anything_is_shut_down(
    tmp_path: Path, no_ray: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    assert end_of(tmp_path, [DIED], events) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {str(DIED).splitlines()[0]}",
        "log: /logs/x.err",
        "step 0 of 9",
    ]
    assert events == ["build", "start 0 auto", "shutdown"], "no restart unless it is asked for"
    assert no_ray == ["start", "end"]


def test_restarts_build_everything_anew_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []
    ends = [DIED, RolloutError("rollout replica 0 failed"), None]
    assert end_of(tmp_path, ends, events, max_restarts=2, resume_mode="disable") == 0
    assert events == [
        *("build", "start 0 disable", "shutdown"),
        *("build", "start 1 auto", "shutdown"),
        *("build", "start 2 auto", "shutdown"),
    ], "a checkpoint of this run is gone on from, whatever it began with"
    said = capsys.readouterr().err
    assert f"restart 1 of trainer.max_restarts=2: {str(DIED).splitlines()[0]}\n" in said
    assert "restart 2 of trainer.max_restarts=2: rollout replica 0 failed\n" in said


def test_without_a_checkpoint_of_its_own_a_restart_begins_as_the_run_did(tmp_path: Path) -> None:
    events: list[str] = []
    assert end_of(tmp_path, [DIED, None], events, max_restarts=1, resume_mode="disable", saved_any=False) == 0
    assert [event for event in events if "start" in event] == ["start 0 disable", "start 1 disable"]


def test_the_run_gives_up_after_its_restarts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []
    assert end_of(tmp_path, [DIED, DIED, DIED, None], events, max_restarts=2) == 1
    assert events.count("build") == 3
    assert capsys.readouterr().err.endswith("given up after restart 2 of trainer.max_restarts=2\n")


@pytest.mark.parametrize(
    "error",
    [
        WorkerError("a rank refused", by_user=True),
        ValueError("trainer.n_gpus_per_node=9 is too much"),
        CheckpointError("the disk is full"),
        GuardError("a teacher went wrong"),
        BestMetricError("no such figure"),
    ],
    ids=["worker's ValueError", "ValueError", "CheckpointError", "GuardError", "BestMetricError"],
)
def test_what_would_end_the_same_again_is_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    events: list[str] = []
    assert end_of(tmp_path, [error, None], events, max_restarts=3) == 1
    assert events.count("build") == 1
    assert events[-1] == "shutdown"
    assert capsys.readouterr().err.startswith(f"error: {error}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    write_checkpoint(tmp_path, 5)
    assert end_of(tmp_path, [number], [], save_freq=2) == code
    said = capsys.readouterr().err
    assert f"stopped by {number.name}: step 5 of 9; the same command goes on from there\n" in said


def write_checkpoint(root: Path, step: int) -> None:
    """One that is whole."""
    (root / f"global_step_{step}").mkdir(parents=True)
    seal(root / f"global_step_{step}", step, 1, {})


def test_how_to_go_on_after_a_signal_follows_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``save_freq`` the best steps are saved and no others."""

    def told(folder: str, **settings: Any) -> str:
        assert end_of(tmp_path / folder, [signal.SIGTERM], [], best_metric="val/reward", test_freq=1, **settings) == 143
        return capsys.readouterr().err.strip().rpartition("step 5 of 9; ")[2]

    not_saved = "this step was not saved, as trainer.save_freq=-1 asks"
    assert told("run") == not_saved
    write_checkpoint(tmp_path / "run", 3)
    assert told("run") == f"{not_saved}; the same command goes on from global_step_3"
    write_checkpoint(tmp_path / "run", 5)
    assert told("run") == "the same command goes on from there"
    assert told("run", resume_mode="disable").startswith("the same command with trainer.resume_mode=auto goes on")


def test_a_failure_in_the_step_that_a_signal_waits_for_is_not_tried_again(tmp_path: Path) -> None:
    class Dies(Trainer):
        def fit(self) -> None:
            self.stop.takes_steps = True
            os.kill(os.getpid(), signal.SIGTERM)
            raise DIED

    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(tmp_path), max_restarts=3))
    trainer: Any = Dies(config, [None], [])
    with pytest.raises(SystemExit) as caught:
        run(trainer, lambda: pytest.fail("restarted"))
    assert caught.value.code == 143


def ray_exits(ray_init: Any) -> None:
    sys.exit(int(signal.SIGTERM))


@pytest.mark.parametrize(
    "session",
    [lambda ray_init: os.kill(os.getpid(), signal.SIGTERM), ray_exits],
    ids=["our handler", "Ray's, while it starts"],
)
def test_a_signal_during_the_start_leaves_at_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_ray: list[str],
    session: Callable[[Any], None],
) -> None:
    monkeypatch.setattr(module, "start_session", session)
    events: list[str] = []
    assert end_of(tmp_path, [None], events) == 143
    assert events == ["build"]
    assert no_ray == ["end"]
    assert capsys.readouterr().err == "left at once at SIGTERM: step 0 of 9\n"

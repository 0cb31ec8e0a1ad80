"""A run that loses a process in every stage, on a real Ray, and goes on with the same command.

The driver is this process, so that a stage can be made to wait (SIGSTOP of whoever it needs) until the victim is dead.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cloudpickle import register_pickle_by_value
from support.in_process_run import settings
from support.launch import metrics_by_step, write_onerec_parquet

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.experimental.agent_loop import actors as actors_module
from verl.trainer.launch import run as module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # five starts, each a minute on a busy machine
register_pickle_by_value(sys.modules[__name__])  # workers do not import test modules

STEPS = 4


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def ray_processes() -> set[int]:
    """Ranks, engines and agent-loop workers on this machine, by their titles."""
    return {
        own.pid for own in psutil.process_iter(["cmdline"]) if "".join(own.info["cmdline"] or []).startswith("ray::")
    }


def rank(trainer: Any) -> Any:
    [group] = trainer.worker_groups._groups
    return group._ranks[1].actor


def engine(trainer: Any) -> Any:
    return trainer.agent_loop_manager._replicas[0].actor


def agent_loop(trainer: Any) -> Any:
    return trainer.agent_loop_manager._workers[0].actor


@dataclass
class Loss:
    """A process that is killed while a stage runs, which meanwhile waits for ``stopped``."""

    step: int
    stage: str
    victim: Callable[[Any], Any]
    stopped: Callable[[Any], Any]
    message: str

    def prepare(self, trainer: Any, killed_at: list[float]) -> None:
        *part, name = self.stage.split(".")
        owner = getattr(trainer, part[0]) if part else trainer
        original = getattr(owner, name)

        def stage(*arguments: Any, **options: Any) -> Any:
            if trainer.global_steps == self.step:
                victim = pid_of(self.victim(trainer))
                os.kill(pid_of(self.stopped(trainer)), signal.SIGSTOP)
                killed_at.append(time.monotonic() + 1.0)
                threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
            return original(*arguments, **options)

        setattr(owner, name, stage)


LOSSES = [
    Loss(1, "generate", rank, engine, "error: actor+ref failed on rank 1 of 2, node "),
    Loss(2, "generate", agent_loop, engine, "error: agent-loop worker 0 (node "),
    Loss(3, "saver.save", rank, rank, "error: actor.checkpoint_outcome failed on rank 1 of 2, node "),
    Loss(4, "update_actor", engine, rank, "error: rollout replica 0 (hf, node "),
]


def test_a_run_that_loses_processes_in_every_stage_names_them_and_goes_on(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it ends as a run that lost nothing: ``test_signals_run``, and the kill run in ``tests/soak``."""
    before, train = ray_processes(), write_onerec_parquet(tmp_path / "train.parquet", 10)
    changes = {"ray_kwargs.ray_init.num_cpus": 2, "trainer.n_gpus_per_node": 2, "trainer.total_training_steps": STEPS}
    changes["trainer.grace_s"] = 5.0  # how long a checkpoint is waited for, of which a stopped rank says nothing
    config = settings(tiny_pair, train, tmp_path / "run", **changes)
    monkeypatch.setattr(actors_module, "SHUTDOWN_S", 2.0)  # what a stopped engine costs
    reported: list[tuple[float, str]] = []
    monkeypatch.setattr(module, "report", lambda text: reported.append((time.monotonic(), text)))
    for restarts, loss in enumerate(LOSSES):
        monkeypatch.setenv("RESTART_COUNT", str(restarts))
        trainer, killed_at = build_trainer(config), []
        loss.prepare(trainer, killed_at)
        with pytest.raises(SystemExit) as ended:
            module.run(trainer)
        assert ended.value.code == (module.LOST_AFTER_SAVE if trainer.saver.saved_any else module.LOST)
        (at, error), _ = reported
        reported.clear()
        cause, log, *_ = error.splitlines()
        assert cause.startswith(loss.message)
        assert "the process died: " in cause
        assert log.startswith("log: /") and ".err on node " in log
        assert at - killed_at[0] < 15, loss
    monkeypatch.setenv("RESTART_COUNT", str(len(LOSSES)))
    module.run(build_trainer(config))

    assert len(metrics_by_step(tmp_path / "run", STEPS)) == STEPS, "every step once"
    deadline = time.monotonic() + 15
    while (left := ray_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "no rank, engine or worker outlives its run"
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data"]["training/restarts"] == len(LOSSES)

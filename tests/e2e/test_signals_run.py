"""Signals and losses of whole runs, through the launch script: exit codes, messages, what is left, going on."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launch import Running, metrics_by_step, processes_of, script_env, small_run, write_onerec_parquet

pytestmark = pytest.mark.slow

STEPS = 12
BATCH = {"data.train_batch_size": 4, "actor_rollout_ref.actor.ppo_mini_batch_size": 4, "trainer.save_freq": 100}
OVERRIDES = small_run("hf", 2, STEPS, **BATCH)


@pytest.fixture(scope="module")
def env(tiny_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return script_env(tiny_pair, write_onerec_parquet(tmp_path_factory.mktemp("data") / "train.parquet", 64))


def test_runs_that_are_stopped_by_signals_go_on_as_if_they_had_not_been(env: dict[str, str], tmp_path: Path) -> None:
    """The driver alone heeds them: sent to all of Ray's processes, as by schedulers, and to the group, as by terminals.

    A data loader's process has a group of its own.
    """
    overrides = [*OVERRIDES, "data.dataloader_num_workers=1"]
    with Running(tmp_path / "whole", overrides, env) as whole:
        assert whole.finish(300).returncode == 0
    stopped_at = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        with Running(tmp_path / "run", overrides, env) as running:
            running.wait_for_steps(stopped_at + 2)
            if number == signal.SIGTERM:
                for pid, title in processes_of(running.process.pid).items():
                    if pid == running.process.pid or "ray::" in title or "/ray/" in title:
                        os.kill(pid, number)
            else:
                os.killpg(running.process.pid, number)
            ended = running.finish(60)
        assert ended.returncode == 128 + number
        before, stopped_at = stopped_at, int((ended.folder / "latest_checkpointed_iteration.txt").read_text())
        assert before + 2 <= stopped_at < STEPS
        assert ended.output.count(f"{number.name}: this step is finished and saved, within 120 s") == 1
        assert f"stopped by {number.name}: step {stopped_at} of {STEPS}, newest checkpoint " in ended.output
        assert "Traceback" not in ended.output

    with Running(tmp_path / "run", overrides, env) as running:
        assert running.finish(300).returncode == 0
    expected, got = metrics_by_step(tmp_path / "whole", STEPS), metrics_by_step(tmp_path / "run", STEPS)
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-6, abs=1e-6), f"step {step}"


def test_a_killed_rank_is_named_with_its_log_and_the_script_starts_the_run_again(
    env: dict[str, str], tmp_path: Path
) -> None:
    with Running(tmp_path, small_run("hf", 2, 500, **BATCH), env | {"MAX_RESTARTS": "1"}) as running:
        running.wait_for_steps(1)
        rank = max(running.processes("ray::WorkerHost"))
        os.kill(rank, signal.SIGKILL)
        wait_for(running, lambda: "restart 1 of MAX_RESTARTS=1" in running.output, 30)
        wait_for(running, lambda: running.processes("ray::WorkerHost"), 120)
        os.kill(running.process.pid, signal.SIGTERM)
        ended = running.finish(60)
    assert ended.returncode == 143
    _, error, rest = ended.output.partition("error: ")
    assert error
    cause, log, *further = rest.splitlines()
    assert re.search(r" failed on rank \d of 2, node ", cause)
    assert ": the process died: Worker unexpectedly exits" in cause
    assert f"-{rank}.err on node " in log
    assert Path(log.removeprefix("log: ").partition(" on node ")[0]).is_file()
    assert any(line.startswith("step ") and "no checkpoint" in line for line in further)


def wait_for(running: Running, reached: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, running.output
        time.sleep(0.05)


def test_sigterm_during_the_start_leaves_at_once(env: dict[str, str], tmp_path: Path) -> None:
    with Running(tmp_path, OVERRIDES, env) as running:
        wait_for(running, lambda: running.processes("ray::"), 120)
        os.kill(running.process.pid, signal.SIGTERM)
        ended = running.finish(30)
    assert ended.returncode == 143
    assert f"left at once at SIGTERM: step 0 of {STEPS}, no checkpoint" in ended.output


def test_a_driver_that_is_killed_takes_its_workers_along(env: dict[str, str], tmp_path: Path) -> None:
    with Running(tmp_path, OVERRIDES, env) as running:
        running.wait_for_steps(1)
        running.process.kill()
        assert running.process.wait(10) == -9
        # Two of Ray's own, which need neither devices nor memory worth mention, wait a minute for a Ray that has gone.
        helpers = running.processes("ray::DashboardAgent") | running.processes("ray::RuntimeEnvAgent")
        deadline = time.monotonic() + 15
        while running.left() - helpers and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running.left() - helpers

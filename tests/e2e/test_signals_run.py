"""Signals and losses of whole runs, through the launch script: exit codes, messages, what is left, going on."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support.launch import (
    OVERLAP,
    Run,
    Running,
    metrics_by_step,
    processes_of,
    script_env,
    small_run,
    write_onerec_parquet,
)

pytestmark = pytest.mark.slow

STEPS = 12
BATCH = {"data.train_batch_size": 4, "actor_rollout_ref.actor.ppo_mini_batch_size": 4, "trainer.save_freq": 100}
OVERRIDES = small_run("hf", 2, STEPS, **BATCH)


@pytest.fixture(scope="module")
def env(tiny_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return script_env(tiny_pair, write_onerec_parquet(tmp_path_factory.mktemp("data") / "train.parquet", 64))


@pytest.mark.parametrize("changes", [{}, OVERLAP], ids=["turns", "overlap"])
def test_a_run_that_loses_a_rank_and_is_stopped_by_signals_goes_on_as_if_nothing_had_been(
    env: dict[str, str], tmp_path: Path, changes: dict[str, int]
) -> None:
    """The driver alone heeds signals: sent to all processes, as by schedulers, and to the group, as by terminals.

    A data loader's process has a group of its own.
    """
    overrides = [*small_run("hf", 2, STEPS, **BATCH, **changes), "data.dataloader_num_workers=1"]
    with Running(tmp_path / "whole", overrides, env) as whole:
        assert whole.finish(300).returncode == 0

    with Running(tmp_path / "run", overrides, env | {"MAX_RESTARTS": "1"}) as running:
        assert running.wait_until(lambda: "\nstep 1 |" in running.output), running.output
        rank = max(running.processes("ray::WorkerHost"))
        os.kill(rank, signal.SIGKILL)
        assert running.wait_until(lambda: "\nstep 2 |" in restarted(running.output), 150), running.output
        for pid, title in processes_of(running.process.pid).items():
            if pid == running.process.pid or "ray::" in title or "/ray/" in title:
                os.kill(pid, signal.SIGTERM)
        ended = running.finish(60)
    check_named(ended.output.partition("error: ")[2].splitlines(), rank)
    stopped_at = check_stopped(ended, signal.SIGTERM, 2)
    with Running(tmp_path / "run", overrides, env) as running:
        assert running.wait_until(lambda: f"\nstep {stopped_at + 2} |" in running.output), running.output
        os.killpg(running.process.pid, signal.SIGINT)
        check_stopped(running.finish(60), signal.SIGINT, stopped_at + 2)

    with Running(tmp_path / "run", overrides, env) as running:
        assert running.finish(300).returncode == 0
    expected, got = metrics_by_step(tmp_path / "whole", STEPS), metrics_by_step(tmp_path / "run", STEPS)
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-6, abs=1e-6), f"step {step}"


def restarted(output: str) -> str:
    """What was written since the launch script started the run again."""
    return output.partition("restart 1 of MAX_RESTARTS=1")[2]


def check_named(report: list[str], rank: int) -> None:
    """The killed rank with its log, and what is safe."""
    cause, log, *further = report
    assert re.search(r" failed on rank \d of 2, node ", cause)
    assert ": the process died: Worker unexpectedly exits" in cause
    assert f"-{rank}.err on node " in log
    assert Path(log.removeprefix("log: ").partition(" on node ")[0]).is_file()
    assert any(line.startswith("step ") and "no checkpoint" in line for line in further)


def check_stopped(ended: Run, number: signal.Signals, least: int) -> int:
    """The step that is saved."""
    output = restarted(ended.output) or ended.output
    step = int((ended.folder / "latest_checkpointed_iteration.txt").read_text())
    assert ended.returncode == 128 + number and least <= step < STEPS
    assert output.count(f"{number.name}: this step is finished and saved, within 120 s") == 1
    assert f"stopped by {number.name}: step {step} of {STEPS}, newest checkpoint " in output
    assert "Traceback" not in output
    return step


def test_sigterm_during_the_start_leaves_at_once(env: dict[str, str], tmp_path: Path) -> None:
    with Running(tmp_path, OVERRIDES, env) as running:
        assert running.wait_until(lambda: bool(running.processes("ray::")), 120), running.output
        os.kill(running.process.pid, signal.SIGTERM)
        ended = running.finish(30)
    assert ended.returncode == 143
    assert f"left at once at SIGTERM: step 0 of {STEPS}, no checkpoint" in ended.output

"""vLLM in processes of its own, as on GPUs: here with two ranks on CPU."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.engines import PLAIN, TRUNCATED, Engine

from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.vllm_replica import unblock_sigterm


def ends_on_sigterm() -> bool:
    """Whether a process that is started now does."""
    code = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_processes_of_the_engine_end_on_sigterm_though_the_replica_does_not() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert not ends_on_sigterm()
        with unblock_sigterm():
            assert ends_on_sigterm()
        assert not ends_on_sigterm()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def kill_engine_processes(replica: RolloutReplica) -> None:
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


async def wait_for_death(replica: RolloutReplica) -> None:
    """Check now and then, as a run does, while no request is under way."""
    async with asyncio.timeout(30):
        while True:
            await replica.check_alive()
            await asyncio.sleep(0.2)


async def replica_and_descendants(replica: RolloutReplica) -> list[int]:
    return [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]


@pytest.fixture
def engine(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> Iterator[Engine]:
    made = Engine("vllm", tmp_path, tiny_tokenizers[1], True, tensor_model_parallel_size=2)
    yield made
    made.replica.close()


@pytest.mark.slow
def test_an_engine_with_processes_of_its_own_is_synced_and_names_what_it_died_of(engine: Engine) -> None:
    for seed in range(2):
        engine.train_a_little(seed)
        engine.sync()
        for params in (PLAIN, TRUNCATED):
            assert engine.difference(params) < 1e-4
    engine.replica.run(kill_engine_processes)
    with pytest.raises(RuntimeError, match=r"engine is dead: .*was killed by SIGKILL"):
        engine.replica.run(wait_for_death)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"engine is dead: .*was killed by SIGKILL"):
            engine.generate(PLAIN)


@pytest.mark.slow
def test_a_killed_replica_takes_its_engine_with_it(engine: Engine) -> None:
    replica, *pids = engine.replica.run(replica_and_descendants)
    assert len(pids) >= 3, "the engine core and two workers"
    os.kill(replica, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]

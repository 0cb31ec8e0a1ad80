"""vLLM in processes of its own, as on GPUs: here with two ranks on CPU. And how the engine of one process is driven."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.engines import PLAIN, TRUNCATED, Engine, check_carried

from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.vllm_replica import InProcessEngine, unblock_sigterm


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
    check_carried(engine)
    engine.train_a_little(2)
    engine.broadcast(processes=2)
    assert engine.difference(PLAIN) < 1e-4
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


class EngineOfSteps:
    """Answers a request after as many steps as it asks for; one that asks for none, after another was answered."""

    def __init__(self) -> None:
        self.steps, self.answered, self.left = 0, 0, dict[str, int]()
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "ended_at", self.steps))

    def add_request(self, request_id: str, prompt: None, steps: int) -> None:
        self.left[request_id] = steps

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        time.sleep(0.001)
        self.steps += 1
        self.left = {name: left - 1 for name, left in self.left.items()}
        ended = [name for name, left in self.left.items() if left == 0 or (left < 0 and self.answered)]
        self.answered += len(ended)
        return [SimpleNamespace(request_id=name, at=self.steps) for name in ended if self.left.pop(name) is not None]

    def reset_prefix_cache(self) -> bool:
        return True


def test_requests_and_other_calls_come_between_the_steps_of_those_that_run() -> None:
    async def run() -> None:
        engine = InProcessEngine(of_steps := EngineOfSteps(), ThreadPoolExecutor(1))

        async def answer(steps: int) -> int:
            async for output in engine.generate(None, steps, "name"):
                at = output.at
            return at

        last = asyncio.create_task(answer(0))
        while of_steps.steps < 3:
            await asyncio.sleep(0.001)
        begun = of_steps.steps
        assert begun < await asyncio.wait_for(answer(5), 10) and await engine.reset_prefix_cache()
        assert await asyncio.wait_for(last, 10) == of_steps.steps, "no step is made for nobody"

    asyncio.run(run())


def test_a_shutdown_does_not_wait_for_answers() -> None:
    async def run() -> None:
        engine = InProcessEngine(of_steps := EngineOfSteps(), ThreadPoolExecutor(1))
        answer = asyncio.create_task(anext(engine.generate(None, 2000, "name")))
        while of_steps.steps < 3:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.shutdown)
        assert of_steps.ended_at == of_steps.steps < 1000, "and no step comes after it"
        with pytest.raises(RuntimeError, match="it was shut down"):
            await asyncio.wait_for(answer, 10)

    asyncio.run(run())

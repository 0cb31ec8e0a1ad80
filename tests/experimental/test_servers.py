"""Which replica a request is asked of, and what becomes of one that hangs: engines that answer when told to."""

import asyncio
from typing import Any

import pytest

from verl.experimental.agent_loop import servers as module
from verl.experimental.agent_loop.base import RolloutError
from verl.experimental.agent_loop.servers import AsyncLLMServerManager, Replica
from verl.workers.rollout.replica import TokenOutput

TIMEOUT_S = 0.3


class Engine:
    """Looks like a Ray actor handle: ``generate.remote`` returns something to await."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[TokenOutput]] = []
        self.request_ids: list[str] = []
        self.generate = self

    def remote(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> Any:
        self.request_ids.append(request_id)
        self.calls.append(asyncio.get_running_loop().create_future())
        return self.calls[-1]

    def answer(self, call: int, token: int = 1) -> None:
        self.calls[call].set_result(TokenOutput([token], None, "stop", 0))


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was cancelled on engines."""
    calls: list[Any] = []
    monkeypatch.setattr(module.ray, "cancel", calls.append)
    return calls


def manage(count: int, timeout_s: float | None = TIMEOUT_S) -> tuple[AsyncLLMServerManager, list[Engine]]:
    engines = [Engine() for _ in range(count)]
    return AsyncLLMServerManager([Replica(f"replica {i}", e) for i, e in enumerate(engines)], 0, timeout_s), engines


async def until(engine: Engine, calls: int) -> None:
    async with asyncio.timeout(5):
        while len(engine.calls) < calls:
            await asyncio.sleep(0.01)


async def test_a_request_that_hangs_is_asked_once_more_elsewhere(cancelled: list[Any]) -> None:
    manager, engines = manage(2)
    task = asyncio.create_task(manager.generate([1], {}, "talk"))
    await until(engines[1], 1)
    assert cancelled == [engines[0].calls[0]]
    engines[1].answer(0, token=7)
    output = await task
    assert (output.token_ids, output.retries) == ([7], 1)
    assert engines[0].request_ids + engines[1].request_ids == ["talk-1", "talk-2"]


async def test_the_conversation_and_new_ones_keep_away_from_a_replica_that_hangs(cancelled: list[Any]) -> None:
    manager, engines = manage(2)
    tasks = [asyncio.create_task(manager.generate([1], {}, "talk"))]
    await until(engines[1], 1)
    for name in ("new", "newer"):
        tasks.append(asyncio.create_task(manager.generate([1], {}, name)))
    await until(engines[1], 3)
    assert len(engines[0].calls) == 1, "although it has fewer in flight"
    for call in range(3):
        engines[1].answer(call)
    assert [(await task).retries for task in tasks] == [1, 0, 0]
    await asyncio.sleep(TIMEOUT_S)
    tasks = [asyncio.create_task(manager.generate([1], {}, "later"))]
    await until(engines[0], 2)  # it has had its time to recover
    engines[0].answer(1)
    assert (await tasks[0]).retries == 0


async def test_a_request_that_hangs_twice_ends_the_run_with_its_id(cancelled: list[Any]) -> None:
    manager, engines = manage(3)
    with pytest.raises(RolloutError) as caught:
        await manager.generate([1], {}, "talk")
    assert str(caught.value) == (
        "request talk-1 was not answered by replica 0, which finished nothing for "
        "actor_rollout_ref.rollout.timeout_s=0.3 s; asked once more, request talk-2 was not answered by replica 1, "
        "which finished nothing for actor_rollout_ref.rollout.timeout_s=0.3 s"
    )
    assert [len(engine.calls) for engine in engines] == [1, 1, 0]
    assert len(cancelled) == 2


async def test_a_lone_replica_that_hangs_ends_the_run(cancelled: list[Any]) -> None:
    manager, engines = manage(1)
    with pytest.raises(RolloutError, match=r"^request talk-1 .* replica 0, .*, and there is no other replica to ask$"):
        await manager.generate([1], {}, "talk")
    assert len(engines[0].calls) == 1


async def test_a_long_queue_is_no_hang(cancelled: list[Any]) -> None:
    """Three requests, each finished within the timeout of the one before; the last waits three times as long."""
    manager, engines = manage(1)
    tasks = [asyncio.create_task(manager.generate([1], {}, name)) for name in "abc"]
    await until(engines[0], 3)
    for call in range(3):
        await asyncio.sleep(0.7 * TIMEOUT_S)
        engines[0].answer(call)
    assert [output.retries for output in await asyncio.gather(*tasks)] == [0, 0, 0]
    assert not cancelled


async def test_without_a_timeout_a_request_is_waited_for(cancelled: list[Any]) -> None:
    manager, engines = manage(2, timeout_s=None)
    task = asyncio.create_task(manager.generate([1], {}, "talk"))
    await asyncio.sleep(2 * TIMEOUT_S)
    assert not task.done()
    engines[0].answer(0)
    assert (await task).retries == 0

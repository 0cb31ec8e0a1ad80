"""Which replica gets a request, and how one that hangs is sent again: engines that answer on command."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from verl.experimental.agent_loop.actors import LocalActor
from verl.experimental.agent_loop.base import RolloutError
from verl.experimental.agent_loop.worker import AsyncLLMServerManager
from verl.single_controller.ray.calls import Remote
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

TIMEOUT_S = 0.2


class Engine:
    """A replica that writes when it is told to."""

    answers, cancel = RolloutReplica.answers, RolloutReplica.cancel

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[TokenOutput]] = []
        self.request_ids: list[str] = []
        self.aborted: list[str] = []
        self.messages: list[int] = []
        """Requests in each message."""
        self._answers: dict[str, asyncio.Task[TokenOutput]] = {}

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        self.request_ids.append(request_id)
        self.calls.append(asyncio.get_running_loop().create_future())
        return await self.calls[-1]

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    @property
    def cancelled(self) -> list[str]:
        return [name for name, call in zip(self.request_ids, self.calls, strict=True) if call.cancelled()]

    def answer(self, call: int, token: int = 1) -> None:
        self.calls[call].set_result(TokenOutput([token], None, "stop", 0))


class Counting(LocalActor):
    """Notes how many requests each message brings."""

    def __getattr__(self, method: str) -> Any:
        begin = super().__getattr__(method).remote
        if method == "answers":
            return SimpleNamespace(remote=lambda new, ids: (self._target.messages.append(len(new)), begin(new, ids))[1])
        return SimpleNamespace(remote=begin)


async def settle() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(10):
        await asyncio.sleep(0)


class Servers:
    """Requests to ``count`` engines."""

    def __init__(self, count: int, first: int = 0, timeout_s: float | None = TIMEOUT_S) -> None:
        self.engines = [Engine() for _ in range(count)]
        loop = asyncio.get_running_loop()
        replicas = [Remote(f"replica {i}", Counting(engine, loop)) for i, engine in enumerate(self.engines)]
        self.manager = AsyncLLMServerManager(replicas, first, timeout_s)

    async def send(self, conversation: str) -> asyncio.Task[TokenOutput]:
        task = asyncio.create_task(self.manager.generate([1], {}, conversation))
        await settle()
        return task

    async def until_sent(self, engine: int, calls: int) -> None:
        async with asyncio.timeout(5):
            while len(self.engines[engine].calls) < calls:
                await asyncio.sleep(0.01)


async def test_conversations_go_to_the_least_busy_replica_and_stay_there() -> None:
    servers = Servers(2, first=1)
    zero, one = servers.engines
    tasks = [await servers.send(name) for name in "abcd"]
    assert one.request_ids == ["a-1", "c-3"], "first=1 begins with replica 1"
    assert zero.request_ids == ["b-2", "d-4"]
    zero.answer(0)
    zero.answer(1)
    await settle()
    tasks.append(await servers.send("a"))
    assert one.request_ids[2:] == ["a-5"], "a has its cache on replica 1"
    servers.manager.forget("a")
    tasks.append(await servers.send("a"))
    assert zero.request_ids[2:] == ["a-6"]
    for engine in servers.engines:
        for call, future in enumerate(engine.calls):
            if not future.done():
                engine.answer(call)
    await asyncio.gather(*tasks)


async def test_conversations_that_are_cut_short_send_nothing_more() -> None:
    servers = Servers(2)
    tasks = [await servers.send(name) for name in "abc"]
    servers.engines[1].answer(0)
    await tasks[1]
    servers.manager.cut_short({"a", "b"})
    await settle()
    assert [engine.aborted for engine in servers.engines] == [["a-1"], []], "b waits for nothing, c is not meant"
    for name in "ab":
        output = await servers.manager.generate([1], {}, name)
        assert (output.token_ids, output.stop_reason) == ([], "abort")
        servers.manager.forget(name)
    assert [len(engine.calls) for engine in servers.engines] == [2, 1]
    tasks.append(await servers.send("a"))  # another conversation may have the name
    for engine, call in ((0, 0), (0, 1), (1, 1)):
        servers.engines[engine].answer(call)
    await asyncio.gather(*tasks)


async def test_a_request_that_hangs_and_new_ones_go_to_another_replica() -> None:
    servers = Servers(2)
    tasks = [await servers.send("talk")]
    await servers.until_sent(1, 1)
    assert servers.engines[0].cancelled == ["talk-1"]
    tasks += [await servers.send(name) for name in ("new", "newer")]
    await servers.until_sent(1, 3)
    assert len(servers.engines[0].calls) == 1, "although it has fewer in flight"
    for call in range(3):
        servers.engines[1].answer(call)
    assert [(await task).retries for task in tasks] == [1, 0, 0]
    await asyncio.sleep(TIMEOUT_S)
    later = await servers.send("later")
    await servers.until_sent(0, 2)  # it has had its time to recover
    servers.engines[0].answer(1)
    assert (await later).retries == 0


HANG = "was not answered by replica {}, which finished nothing for actor_rollout_ref.rollout.timeout_s=0.2 s"


@pytest.mark.parametrize(
    ("count", "message"),
    [(3, f"request talk-1 {HANG.format(0)}; request talk-2 {HANG.format(1)}"), (1, f"request talk-1 {HANG.format(0)}")],
)
async def test_a_request_that_nobody_answers_ends_the_run_with_its_id(count: int, message: str) -> None:
    servers = Servers(count)
    with pytest.raises(RolloutError) as caught:
        await servers.manager.generate([1], {}, "talk")
    assert str(caught.value) == message
    assert [len(engine.calls) for engine in servers.engines] == [1, 1, 0][:count]
    await settle()
    assert sum(len(engine.cancelled) for engine in servers.engines) == min(count, 2)


async def test_a_long_queue_is_no_hang() -> None:
    """Three requests, each finished within the timeout of the one before; the last waits twice as long."""
    servers = Servers(1)
    tasks = [await servers.send(name) for name in "abc"]
    for call in range(3):
        await asyncio.sleep(0.7 * TIMEOUT_S)
        servers.engines[0].answer(call)
    assert [output.retries for output in await asyncio.gather(*tasks)] == [0, 0, 0]
    assert not servers.engines[0].cancelled


async def test_requests_of_one_moment_travel_together_and_so_do_their_answers() -> None:
    servers = Servers(1)
    engine = servers.engines[0]
    tasks = [asyncio.create_task(servers.manager.generate([1], {}, str(row))) for row in range(20)]
    await settle()
    assert engine.messages == [16, 4], "the first sixteen wait for no more"
    assert engine.request_ids == [f"{row}-{row + 1}" for row in range(20)]
    for call in (3, 5, 19):
        engine.answer(call, token=call)
    await settle()
    assert [row for row, task in enumerate(tasks) if task.done()] == [3, 5, 19]
    assert engine.messages == [16, 4, 0, 0], "one question for what is left of each message"
    tasks.append(await servers.send("later"))  # while others are waited for
    assert engine.messages[4:] == [1]
    for call in set(range(21)) - {3, 5, 19}:
        engine.answer(call, token=call)
    assert [output.token_ids for output in await asyncio.gather(*tasks)] == [[call] for call in range(21)]


async def test_an_error_is_for_all_requests_of_its_message_that_wait() -> None:
    servers = Servers(1)
    tasks = [asyncio.create_task(servers.manager.generate([1], {}, name)) for name in "abc"]
    await settle()
    servers.engines[0].answer(0)
    await settle()
    servers.engines[0].calls[1].set_exception(ValueError("refused"))
    outputs = await asyncio.gather(*tasks, return_exceptions=True)
    assert outputs[0].token_ids == [1] and [str(error) for error in outputs[1:]] == ["refused"] * 2

"""A rollout replica in a process of its own, as it runs in production, for tests that start a real engine.

A test hands over an async function of the replica; it runs in that process, and its result or exception comes back.
"""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import RolloutReplica, get_replica_class

START_TIMEOUT_S = 240
CALL_TIMEOUT_S = 120


class ReplicaProcess:
    """Starts in the background; the first ``run`` waits for it."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, model_config))
        self._process.start()
        theirs.close()
        self._launched = False

    def run(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """``await function(replica, *arguments)`` over there."""
        if not self._launched:
            self._receive(START_TIMEOUT_S)
            self._launched = True
        self._pipe.send((function, arguments))
        return self._receive(CALL_TIMEOUT_S)

    def kill(self) -> None:
        """End the process at once, as the kernel does where memory runs out."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Shut the replica down and end the process."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the replica's process gave no answer for {timeout_s} s")
        outcome = self._pipe.recv()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _serve(pipe: Connection, config: RolloutConfig, model_config: HFModelConfig) -> None:
    asyncio.run(_serve_async(pipe, get_replica_class(config.name)(config, model_config)))


async def _serve_async(pipe: Connection, replica: RolloutReplica) -> None:
    pipe.send(await _outcome(replica.launch()))
    while True:
        try:
            function, arguments = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        pipe.send(await _outcome(function(replica, *arguments)))
    await replica.shutdown()


async def _outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except (ValueError, RuntimeError) as error:
        return (
            type(error)(*map(str, error.args))
            if type(error) in (ValueError, RuntimeError)
            else RuntimeError(repr(error))
        )

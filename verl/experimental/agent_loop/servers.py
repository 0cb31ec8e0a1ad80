"""The replicas as one async engine, for the conversations of one agent-loop worker.

In: requests of conversations. Out: the answers, from the replica with the fewest requests in flight.

A replica that leaves a request unanswered and finishes no other for ``timeout_s`` is taken to hang: the request is
cancelled there and asked once more elsewhere. So a long queue is no hang, and neither is a long answer among others.

::

    ask ──► answer
     └─ silence of timeout_s ──► cancel, ask another replica ──► answer, counted as retried
                                  │ (none other)               └─ silence ──► RolloutError with the request's id
                                  └──► RolloutError likewise
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from verl.experimental.agent_loop.base import RolloutError
from verl.experimental.agent_loop.remote_calls import Remote
from verl.workers.rollout.replica import TokenOutput

logger = logging.getLogger(__name__)


class AsyncLLMServerManager:
    """See the module.

    A conversation starts on the replica with the fewest requests in flight and stays there, where the cache holds its
    earlier turns, unless that replica hangs.
    """

    def __init__(self, replicas: Sequence[Remote], first: int = 0, timeout_s: float | None = None) -> None:
        """
        Args:
            first: the replica to begin with among equally busy ones; workers differ in it.
            timeout_s: see the module; None: requests are waited for however long they take.
        """
        self._replicas = list(replicas)
        self._order = [(first + offset) % len(self._replicas) for offset in range(len(self._replicas))]
        self._in_flight = [0] * len(self._replicas)
        self._answered_at = [0.0] * len(self._replicas)
        self._avoid_until = [0.0] * len(self._replicas)
        """A replica that was taken to hang gets nothing for as long as it had, unless it answers or all others hang."""
        self._chosen: dict[str, int] = {}
        self._requests = 0
        self._timeout_s = timeout_s

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        """One turn of the conversation ``request_id``.

        Raises:
            RolloutError: the replica failed, or two of them hang; names them, the request and the cause.
        """
        if request_id not in self._chosen or self._avoided(self._chosen[request_id]):
            self._chosen[request_id] = self._least_busy(self._order)
        first = self._chosen[request_id]
        try:
            return await self._ask(first, prompt_ids, sampling_params, request_id)
        except TimeoutError as silence:
            logger.warning("%s; it is asked of another replica", silence)
            hung = str(silence)
        others = [replica for replica in self._order if replica != first]
        if not others:
            raise RolloutError(f"{hung}, and there is no other replica to ask")
        second = self._chosen[request_id] = self._least_busy(others)
        try:
            answer = await self._ask(second, prompt_ids, sampling_params, request_id)
        except TimeoutError as silence:
            raise RolloutError(f"{hung}; asked once more, {silence}") from silence
        return replace(answer, retries=1)

    def forget(self, request_id: str) -> None:
        """The conversation is over."""
        self._chosen.pop(request_id, None)

    def _least_busy(self, among: Sequence[int]) -> int:
        return min(among, key=lambda replica: (self._avoided(replica), self._in_flight[replica]))

    def _avoided(self, replica: int) -> bool:
        return time.monotonic() < self._avoid_until[replica]

    async def _ask(
        self, chosen: int, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> TokenOutput:
        """One request to one replica; raises TimeoutError, with who and what, where that hangs."""
        replica = self._replicas[chosen]
        self._in_flight[chosen] += 1
        self._requests += 1  # part of the engine's request id: it may still be closing the conversation's last turn
        own_id = f"{request_id}-{self._requests}"
        call = replica.actor.generate.remote(prompt_ids, sampling_params, own_id)
        answer: asyncio.Future[TokenOutput] = asyncio.ensure_future(call)
        try:
            if self._timeout_s is not None and not await self._comes(answer, chosen, self._timeout_s):
                ray.cancel(call)
                self._avoid_until[chosen] = time.monotonic() + self._timeout_s
                raise TimeoutError(
                    f"request {own_id} was not answered by {replica.name}, which finished nothing for "
                    f"actor_rollout_ref.rollout.timeout_s={self._timeout_s:g} s"
                )
            output = await answer
        except RayError as error:
            account = replica.account_of(error, await replica.log_async())
            raise RolloutError(f"{replica.name} failed to generate: {account}") from error
        finally:
            answer.cancel()
            self._in_flight[chosen] -= 1
        self._answered_at[chosen] = time.monotonic()
        self._avoid_until[chosen] = 0.0
        return output

    async def _comes(self, answer: asyncio.Future[TokenOutput], chosen: int, timeout_s: float) -> bool:
        """Wait for an answer; False once the replica has been silent for too long."""
        asked_at = time.monotonic()
        while not answer.done():
            left = max(asked_at, self._answered_at[chosen]) + timeout_s - time.monotonic()
            if left <= 0:
                return False
            await asyncio.wait({answer}, timeout=left)
        return True

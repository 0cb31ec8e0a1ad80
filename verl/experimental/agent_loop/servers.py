"""The replicas as one async engine, for the conversations of one agent-loop worker.

In: requests of conversations. Out: the answers, from the replica with the fewest requests in flight.

A replica that leaves a request unanswered and finishes no other for ``timeout_s`` counts as hanging: the request is
cancelled there and sent to another replica, once. A long queue or one long answer among others does not count.

::

    send ──► answer
     └─ nothing for timeout_s ──► cancel, send to another replica ──► answer, counted as retried
                                   │ (there is none)                └─ nothing ──► RolloutError that names both
                                   └──► RolloutError with the request's id
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from verl.experimental.agent_loop.base import RolloutError
from verl.single_controller.ray.calls import Remote, is_by_user
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
            first: the replica to begin with among equally busy ones; each worker begins with another.
            timeout_s: see the module; None: no limit.
        """
        self._replicas = list(replicas)
        self._order = [(first + offset) % len(self._replicas) for offset in range(len(self._replicas))]
        self._in_flight = [0] * len(self._replicas)
        self._answered_at = [0.0] * len(self._replicas)
        self._avoid_until = [0.0] * len(self._replicas)
        """After a hang: no new requests until then, unless the replica answers or all others hang."""
        self._chosen: dict[str, int] = {}
        # Makes a request's id unique: the engine may still be closing the conversation's last turn.
        self._numbers = itertools.count(1)
        self._timeout_s = math.inf if timeout_s is None else timeout_s

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        """One turn of the conversation ``request_id``.

        Raises:
            RolloutError: the replica failed, or two of them hang; names them, the request and the cause.
        """
        left, silences = list(self._order), []
        for retries in range(min(2, len(left))):
            chosen = self._chosen.get(request_id)
            if chosen not in left or self._avoided(chosen):
                chosen = min(left, key=lambda replica: (self._avoided(replica), self._in_flight[replica]))
            self._chosen[request_id] = chosen
            left.remove(chosen)
            try:
                return replace(await self._send(chosen, prompt_ids, sampling_params, request_id), retries=retries)
            except TimeoutError as silence:
                logger.warning("%s", silence)
                silences.append(str(silence))
        raise RolloutError("; ".join(silences))

    def forget_conversations(self) -> None:
        """Those so far are over."""
        self._chosen.clear()

    def _avoided(self, replica: int) -> bool:
        return time.monotonic() < self._avoid_until[replica]

    async def _send(
        self, chosen: int, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> TokenOutput:
        """One request to one replica; a TimeoutError that names both where it hangs."""
        replica = self._replicas[chosen]
        self._in_flight[chosen] += 1
        own_id = f"{request_id}-{next(self._numbers)}"
        call, sent_at = replica.actor.generate.remote(prompt_ids, sampling_params, own_id), time.monotonic()
        answer: asyncio.Future[TokenOutput] = asyncio.ensure_future(call)
        try:
            while not answer.done():
                left = max(sent_at, self._answered_at[chosen]) + self._timeout_s - time.monotonic()
                if left <= 0:
                    ray.cancel(call)
                    self._avoid_until[chosen] = time.monotonic() + self._timeout_s
                    raise TimeoutError(
                        f"request {own_id} was not answered by {replica.name}, which finished nothing for "
                        f"actor_rollout_ref.rollout.timeout_s={self._timeout_s:g} s"
                    )
                await asyncio.wait({answer}, timeout=left)
            output = answer.result()
        except RayError as error:
            account = replica.account_of(error, await replica.log_async())
            message = f"{replica.name} failed to generate: {account}"
            raise RolloutError(message, by_user=is_by_user(error)) from error
        finally:
            answer.cancel()
            self._in_flight[chosen] -= 1
        self._answered_at[chosen] = time.monotonic()
        self._avoid_until[chosen] = 0.0
        return output

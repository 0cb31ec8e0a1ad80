"""Requests to one replica. Those of one moment travel together, and so do answers that end together: for each alone a
call of Ray's costs as much time as a small model's token.

::

    ask ─┐                                       ┌─► answer
    ask ─┼─► answers(new, ids) ──► the first of ─┼─► answer
    ask ─┘                          them ended   └─► answers([], ids that are left) ──► ...
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from verl.single_controller.ray.calls import Remote
from verl.workers.rollout.replica import TokenOutput

AT_ONCE = 16
"""Requests that are sent without waiting for more: prompts of many tokens take their time to be made."""


class ReplicaClient:
    """What one worker asks of one replica; all methods are called from one event loop."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.in_flight = 0
        """Requests that are under way."""
        self.answered_at = 0.0
        self.avoid_until = 0.0
        """After a hang: no new requests until then, unless the replica answers or all others hang."""
        self._new: dict[str, tuple[tuple[Any, ...], asyncio.Future[TokenOutput]]] = {}
        """Requests that are not sent yet: the arguments of ``generate``, and what waits for the answer."""
        self._receiving = set[asyncio.Task[None]]()

    @property
    def is_avoided(self) -> bool:
        """Whether a hang is not long ago."""
        return time.monotonic() < self.avoid_until

    def ask(
        self, prompt_ids: list[int], sampling_params: Mapping[str, Any], request_id: str
    ) -> asyncio.Future[TokenOutput]:
        """The answer to come; cancelled, nothing more is heard of it. Arguments as `RolloutReplica.generate`."""
        loop = asyncio.get_running_loop()
        if not self._new:
            loop.call_soon(self._send)
        answer: asyncio.Future[TokenOutput] = loop.create_future()
        self._new[request_id] = (prompt_ids, sampling_params, request_id), answer
        if len(self._new) == AT_ONCE:
            self._send()
        return answer

    def abort(self, request_ids: Sequence[str]) -> Any:
        """Begin to have these requests end with what is written."""
        self._send()  # they may be among them
        return self.remote.actor.abort.remote(request_ids)

    def cancel(self, request_id: str) -> None:
        """Have nothing more written for a request whose answer nobody waits for."""
        self._send()
        self.remote.actor.cancel.remote([request_id])

    def _send(self) -> None:
        new, self._new = self._new, {}
        if not new:
            return
        waiting = {name: answer for name, (_, answer) in new.items()}
        try:
            call = self.remote.actor.answers.remote([request for request, _ in new.values()], list(new))
        except Exception as error:  # such as a full object store
            _fail(waiting, error)
            return
        # An event loop keeps no reference of its own.
        self._receiving.add(task := asyncio.create_task(self._receive(call, waiting)))
        task.add_done_callback(self._receiving.discard)

    async def _receive(self, call: Any, waiting: dict[str, asyncio.Future[TokenOutput]]) -> None:
        try:
            while True:
                for request_id, output in (await call).items():
                    if not (answer := waiting.pop(request_id)).done():
                        answer.set_result(output)
                waiting = {name: answer for name, answer in waiting.items() if not answer.done()}
                if not waiting:
                    return
                call = self.remote.actor.answers.remote([], list(waiting))
        except Exception as error:
            _fail(waiting, error)


def _fail(waiting: Mapping[str, asyncio.Future[TokenOutput]], error: Exception) -> None:
    """Give an error to those who wait."""
    for answer in waiting.values():
        if not answer.done():
            answer.set_exception(error)

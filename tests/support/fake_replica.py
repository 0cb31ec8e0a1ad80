"""A replica without a model, for the manager's Ray test: the real order and checks, an engine of four lines.

It answers a prompt with ``[last prompt token, seed mod 100, replica]`` and the end token, and writes what happens to
it into the file ``engine_kwargs["fake"]["log"]``. A prompt that begins with ``RAISE`` or ``DIE`` does that; one that
begins with ``HANG`` is never answered by replica 0, one with ``STALL`` by none, and no sync by replica 0 while the file
``hang`` is beside the log.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.workers.rollout.replica import ABORTED, ModelInfo, RolloutReplica, SamplingOptions, TokenOutput

RAISE, DIE, END, HANG, STALL = 100, 101, 102, 103, 104
SHAPES = {"embed.weight": (4, 2), "norm.weight": (2,)}
"""What a sync has to bring."""


class FakeReplica(RolloutReplica):
    """See the module."""

    def log(self, event: str) -> None:
        with Path(self.config.engine_kwargs["fake"]["log"]).open("a", encoding="utf-8") as stream:
            stream.write(f"{self.replica_rank} {event}\n")

    async def launch(self) -> None:
        if self.config.engine_kwargs["fake"].get("fail_launch"):
            raise RuntimeError("no memory for the cache")
        self.model_info = ModelInfo(200, 200, (END,), END, SHAPES)
        self.stalled: dict[str, asyncio.Event] = {}
        self.log(f"launch {os.environ.get('CUDA_VISIBLE_DEVICES')}")

    async def _launch(self) -> None:
        pass

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        if prompt[0] == DIE:
            os._exit(1)
        if prompt[0] == RAISE:
            raise RuntimeError("the kernel failed")
        if prompt[0] == STALL or (prompt[0] == HANG and self.replica_rank == 0):
            self.stalled[request_id] = asyncio.Event()
            try:
                await self.stalled[request_id].wait()
                return TokenOutput([], [], ABORTED, self.weight_version)
            except asyncio.CancelledError:
                self.log("cancelled")
                raise
        await asyncio.sleep(0.01)
        ids = [prompt[-1], (options.seed or 0) % 100, self.replica_rank, END][: options.max_tokens]
        return TokenOutput(ids, [-0.5] * len(ids) if options.logprobs else None, "stop", self.weight_version)

    async def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.stalled[request_id].set()

    async def _start_update(self) -> None:
        if self._asleep:
            self.log("wake weights")
        while self.replica_rank == 0 and Path(self.config.engine_kwargs["fake"]["log"]).with_name("hang").exists():
            await asyncio.sleep(0.1)
        self.log("start")

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        await asyncio.sleep(0.05)
        if "path" in update_info:
            Path(update_info["path"]).stat()  # a bucket stays until every engine has loaded it
        self.log(f"load {' '.join(update_info['names'])}")

    async def _finish_update(self) -> list[str]:
        self.log("finish")
        return []

    async def _sleep(self) -> None:
        self.log("sleep")

    async def _shutdown(self) -> None:
        self.log("shutdown")

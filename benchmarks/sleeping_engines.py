"""Steps on an engine that takes a fixed time for a token and computes nothing.

The queue of batches, the manager, the agent-loop worker and its requests are the project's own, in this process. Engine
and data are stand-ins: row k of the data is the prompt ``[k + FIRST]``, and its answer has the k-th length. With a
`LoopOfItsOwnTime` nothing waits, and times are those that would have passed.
"""

import asyncio
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch.utils.data import Dataset

from verl.config import PPOConfig
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.protocol import DataProto
from verl.trainer.data import PromptStream
from verl.trainer.ppo.rollout_queue import RolloutQueue
from verl.utils.timing import Timeline
from verl.workers.rollout.replica import ABORTED, ModelInfo, RolloutReplica, SamplingOptions, TokenOutput

END, FIRST, VOCABULARY = 1, 2, 1 << 20
"""The token that ends an answer, the first of a prompt, and how many there are."""


def token_at(row: int, place: int) -> int:
    """What the answer to a row has at a place before its end."""
    return FIRST + (31 * row + place) % 1000


class SleepingReplica(RolloutReplica):
    """Its answers are those of the module; the log-prob at place k is -k, less the version of the weights."""

    async def launch(self) -> None:
        self.model_info = ModelInfo(VOCABULARY, VOCABULARY, (END,), 0, {})
        self._aborts: dict[str, asyncio.Event] = {}

    async def _launch(self) -> None:
        pass

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        settings = self.config.engine_kwargs["sleeping"]
        row, loop = prompt[0] - FIRST, asyncio.get_running_loop()
        length = min(settings["lengths"][row] - options.place, options.max_tokens)
        began_s, aborted = loop.time(), asyncio.Event()
        self._aborts[request_id] = aborted
        with suppress(TimeoutError):
            await asyncio.wait_for(aborted.wait(), length * settings["token_s"])
        del self._aborts[request_id]
        passed = math.floor((loop.time() - began_s) / settings["token_s"] + 1e-6)
        places = range(options.place, options.place + (min(passed, length) if aborted.is_set() else length))
        ids = [END if place == settings["lengths"][row] - 1 else token_at(row, place) for place in places]
        log_probs = [-float(place) - self.weight_version for place in places] if options.logprobs else None
        reason = ABORTED if len(ids) < length else "length"
        return TokenOutput(ids, log_probs, reason, self.weight_version)

    async def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in self._aborts.keys() & set(request_ids):  # others have just ended
            self._aborts[request_id].set()

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        pass

    async def _shutdown(self) -> None:
        pass


class LoopOfItsOwnTime(asyncio.SelectorEventLoop):
    """Wherever it would wait for a timer, its time jumps there."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__()
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def jump(timeout: float | None) -> Any:
            self._now_s += timeout or 0.0
            return select(0)

        selector.select = jump

    def time(self) -> float:
        return self._now_s


class Rows(Dataset[dict[str, Any]]):
    """So many prompts, of which the first ten are a source of their own."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.sources = ["few"] * 10 + ["many"] * (count - 10)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt_ids": [index + FIRST], "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Every pass has the same rows."""


def prepare(rows: dict[str, Any], *, n: int, step: int) -> DataProto:
    """As the trainer does."""
    prompts = DataProto.from_single_dict(rows)
    prompts.non_tensor_batch["uid"] = prompts.array("index").astype(str).astype(object) + f"-{step}"
    prompts.meta_info = {"global_steps": step, "epoch": 0, "validate": False}
    return prompts.repeat(n)


@dataclass
class Step:
    """What a step trains on."""

    prompts: DataProto
    answers: DataProto
    seconds: float
    """From its begin to the last answer that it takes."""
    metrics: dict[str, float]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        width = self.answers.batch["responses"].shape[1]
        return self.answers.batch["attention_mask"][:, -width:].sum(1).tolist()


class Steps:
    """Steps over rows whose answers have these lengths, without a model."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch: int,
        loop: asyncio.AbstractEventLoop,
        token_s: float = 1.0,
        saved: Mapping[str, Any] | None = None,
        max_staleness: int = 0,
        source_weights: dict[str, float] | None = None,
        **rollout: Any,
    ) -> None:
        config, self._loop = PPOConfig(), loop
        config.data.train_batch_size, config.trainer.max_staleness = batch, max_staleness
        config.data.source_weights = source_weights or {}
        settings = {"name": "hf", "prompt_length": 1, "response_length": max(lengths), "calculate_log_probs": True}
        for name, value in (settings | rollout).items():
            setattr(config.actor_rollout_ref.rollout, name, value)
        config.actor_rollout_ref.rollout.engine_kwargs = {"sleeping": {"lengths": lengths, "token_s": token_s}}
        rank = {"rank": 0, "local_rank": 0, "node_id": "", "node_ip": "", "cuda_visible_devices": ""}
        ranks: Any = SimpleNamespace(get_placement=lambda: [rank])
        tokenizer: Any = SimpleNamespace(pad_token_id=0)
        with mock.patch.object(asyncio, "new_event_loop", lambda: loop):
            self.manager = AgentLoopManager(config, ranks, tokenizer, device="cpu", watch=lambda: None, in_process=True)
        with mock.patch.object(agent_loop, "get_replica_class", lambda name: SleepingReplica):
            self.manager.start()
        self.manager.wait_ready()
        rows: Any = Rows(len(lengths))
        self.stream, self.done = PromptStream(rows, config.data, steered=bool(source_weights)), 0
        if saved is not None:
            self.stream.load_state_dict(saved)
            self.done = saved["done"]
            self._sync(self.done)
        everything = config, self.stream, prepare, lambda: self.manager, Timeline(None)
        self.queue = RolloutQueue(*everything, total_steps=10**9, saved=saved or {})
        self._batches = self.queue.batches(self.done)

    def take(self, count: int) -> Iterator[Step]:
        """The next steps; each ends with new weights."""
        for prompts in itertools.islice(self._batches, count):
            began_s = self._loop.time()
            answers = self.queue.answers_to(prompts)
            self.done += 1
            step = Step(prompts, answers, self._loop.time() - began_s, self.queue.step_metrics())
            if self.queue.is_low:
                self.queue.drain()
                self._sync(self.done)
            yield step

    def _sync(self, version: int) -> None:
        for replica in self.manager._replicas:
            replica.actor._target.weight_version = version
        self.manager.weight_version = version

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint would hold."""
        return {**self.stream.state_dict(), **self.queue.state_dict(), "done": self.done}

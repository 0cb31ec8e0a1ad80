"""Generation in the calling process: one engine, one agent-loop worker, one event loop, and no Ray.

In and out as ``agent_loop.AgentLoopManager``, for which this stands in where a model is small: prompts as a
``DataProto`` in, the rollout's keys out; weights of the student come bucket by bucket.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.experimental.agent_loop.rows import summarise
from verl.experimental.agent_loop.sampling import SEED_KEY, sample_seeds
from verl.experimental.agent_loop.worker import AgentLoopWorker
from verl.protocol import DataProto
from verl.workers.rollout.replica import RolloutReplica, TokenOutput, get_replica_class


class WeightSource(Protocol):
    """The part of the student's group that a weight sync needs; lists have one entry."""

    def num_weight_buckets(self) -> int: ...

    def export_weight_bucket(self, index: int) -> list[dict[str, Any] | None]: ...

    def release_weight_bucket(self, index: int) -> Any: ...


class LocalAgentLoopManager:
    """The trainer's side of generation, with everything behind it in this process.

    The engine never sleeps: it holds no memory that training wants.

    Args:
        config: of the run; ``rollout.name`` names the engine.
        tokenizer: the student's.
        replica_class: the engine; None: the one that ``rollout.name`` names.
    """

    asleep = False

    def __init__(
        self,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        replica_class: Callable[..., RolloutReplica] | None = None,
    ) -> None:
        models = config.actor_rollout_ref
        self._rollout = models.rollout
        self._loop = asyncio.new_event_loop()
        self._replica = (replica_class or get_replica_class(models.rollout.name))(models.rollout, models.model)
        self._worker = AgentLoopWorker(config, tokenizer, self)
        self._with_tools = bool(self._worker.context.tools)

    def start(self) -> None:
        """Start the engine.

        Raises:
            ValueError, RuntimeError: it did not start.
        """
        self._loop.run_until_complete(self._replica.launch())

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        """One turn of a conversation; for the agent-loop worker."""
        return await self._replica.generate(prompt_ids, sampling_params, request_id)

    def forget(self, request_id: str) -> None:
        """The conversation is over: one engine has nothing to remember of it."""

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Answer every prompt; the rollout's new keys, in the order of ``prompts``."""
        rows = DataProto.from_dict(
            non_tensors={
                **prompts.non_tensor_batch,
                SEED_KEY: np.array(sample_seeds(self._rollout.seed, prompts), dtype=object),
            },
            meta_info={"validate": prompts.meta_info["validate"]},
        )
        result = self._loop.run_until_complete(self._worker.generate_sequences(rows))
        result.rows.meta_info["metrics"] = summarise(result.metrics, self._with_tools)
        return result.rows

    def update_weights(self, student: WeightSource, version: int) -> None:
        """Carry the student's weights to the engine."""
        self._loop.run_until_complete(self._update_weights(student, version))

    async def _update_weights(self, student: WeightSource, version: int) -> None:
        await self._replica.start_weight_update()
        for index in range(student.num_weight_buckets()):
            [bucket] = student.export_weight_bucket(index)
            assert bucket is not None, "the only rank of its node exports every bucket"
            try:
                await self._replica.update_weights(bucket)
            finally:
                student.release_weight_bucket(index)
        await self._replica.finish_weight_update(version)

    def sleep(self) -> None:
        """Nothing; see the class."""

    def shutdown(self) -> None:
        """Stop the engine; a second call does nothing."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._replica.shutdown())
            self._loop.close()

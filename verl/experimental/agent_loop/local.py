"""Generation in the calling process: one engine, one agent-loop worker, one event loop, and no Ray.

In and out as ``agent_loop.AgentLoopManager``, for which this stands in where a model is small: prompts as a
``DataProto`` in, the rollout's keys out; weights of the student come bucket by bucket.
"""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.experimental.agent_loop.rows import summarise
from verl.experimental.agent_loop.sampling import SEED_KEY, sample_seeds
from verl.experimental.agent_loop.worker import AgentLoopWorker
from verl.protocol import DataProto
from verl.weight_sync.sync import WeightSource, send_weights
from verl.workers.rollout.replica import RolloutReplica, TokenOutput, get_replica_class


class _LocalEngine:
    """The engine, called as a Ray actor is: ``engine.method.remote(...)`` starts a call."""

    def __init__(self, replica: RolloutReplica) -> None:
        for method in (replica.start_weight_update, replica.update_weights, replica.finish_weight_update):
            setattr(self, method.__name__, SimpleNamespace(remote=method))


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
        """Send the student's weights to the engine; see ``verl.weight_sync``."""

        def wait(task: str, calls: list[Any]) -> None:
            for call in calls:
                self._loop.run_until_complete(call)

        send_weights(student, [_LocalEngine(self._replica)], [(0,)], wait, version)

    def sleep(self) -> None:
        """Nothing; see the class."""

    def shutdown(self) -> None:
        """Stop the engine; a second call does nothing."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._replica.shutdown())
            self._loop.close()

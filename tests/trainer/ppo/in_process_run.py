"""A whole distillation run in this process: real workers, agent loops and the small engine, and no Ray.

The parts are those of a run; only the calls between them, which Ray makes elsewhere, are plain ones here.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.experimental.agent_loop.rows import summarise
from verl.experimental.agent_loop.sampling import SEED_KEY, sample_seeds
from verl.experimental.agent_loop.worker import AgentLoopWorker
from verl.protocol import DataProto
from verl.single_controller.base.decorator import Dispatch, Execute, registered_methods
from verl.single_controller.base.worker import Worker
from verl.trainer.config import PPOConfig
from verl.utils.tracking import Tracking
from verl.workers.rollout.hf_replica import HFReplica


class Killed(BaseException):
    """The process ends here."""


class InProcessGroup:
    """One rank in this process, called as a worker group is."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._registrations = registered_methods(type(worker))

    def __getattr__(self, name: str) -> Any:
        registration, method = self._registrations[name], getattr(self._worker, name)
        if registration.dispatch_mode is Dispatch.DP_COMPUTE_PROTO or registration.execute_mode is Execute.RANK_ZERO:
            return method
        return lambda *args, **kwargs: [method(*args, **kwargs)]


class InProcessEngines:
    """Stands in for the agent-loop manager: one replica, one agent-loop worker, one event loop.

    Args:
        dies_in_batch: number of the batch, from 1, during which the process ends; None: none.
    """

    asleep = False

    def __init__(self, config: PPOConfig, tokenizer: Any, dies_in_batch: int | None) -> None:
        self.loop = asyncio.new_event_loop()
        models = config.actor_rollout_ref
        self.seed = models.rollout.seed
        self.replica = HFReplica(models.rollout, models.model)
        self.loop.run_until_complete(self.replica.launch())
        self.worker = AgentLoopWorker(config, tokenizer, self)
        self.batches, self.dies_in_batch = 0, dies_in_batch

    def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> Any:
        return self.replica.generate(prompt_ids, sampling_params, request_id)

    def forget(self, request_id: str) -> None:
        pass

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        self.batches += 1
        if self.batches == self.dies_in_batch:
            raise Killed
        seeds = np.array(sample_seeds(self.seed, prompts), dtype=object)
        rows = DataProto.from_dict(
            non_tensors={**prompts.non_tensor_batch, SEED_KEY: seeds},
            meta_info={"validate": prompts.meta_info["validate"]},
        )
        result = self.loop.run_until_complete(self.worker.generate_sequences(rows))
        result.rows.meta_info["metrics"] = summarise(result.metrics, with_tools=False)
        return result.rows

    def update_weights(self, student: InProcessGroup, version: int) -> None:
        self.loop.run_until_complete(self._update(student, version))

    async def _update(self, student: InProcessGroup, version: int) -> None:
        await self.replica.start_weight_update()
        for index in range(student.num_weight_buckets()):
            await self.replica.update_weights(student.export_weight_bucket(index)[0])
            student.release_weight_bucket(index)
        await self.replica.finish_weight_update(version)

    def sleep(self) -> None:
        pass


def run_in_process(
    config: PPOConfig, dies_in_batch: int | None = None, tamper: Callable[[Any], None] | None = None
) -> None:
    """Train as ``main_onpolicy_distill`` does, until the end or the kill.

    Args:
        tamper: gets the trainer before it starts, to break something.
    """
    trainer: Any = build_trainer(config)
    workers = {
        role: trainer.role_worker_mapping[role](**trainer.worker_arguments(role) | {"device": "cpu"})
        for role in trainer.roles
    }
    for worker in workers.values():
        worker.peers = workers
        worker.init_model()
    trainer.role_groups = {role: InProcessGroup(worker) for role, worker in workers.items()}
    trainer.actor_wg = trainer.role_groups["actor"]
    trainer.agent_loop_manager = InProcessEngines(config, trainer.tokenizer, dies_in_batch)
    trainer.logger = Tracking("project", "run", ["file"], config=config, local_dir=config.trainer.default_local_dir)
    try:
        trainer.sync_weights()
        if tamper is not None:
            tamper(trainer)
        trainer.fit()
    except Killed:
        trainer.actor_wg.checkpoint_outcome(True)  # its thread would outlive the kill here
    finally:
        trainer.logger.finish()
        trainer.agent_loop_manager.loop.run_until_complete(trainer.agent_loop_manager.replica.shutdown())

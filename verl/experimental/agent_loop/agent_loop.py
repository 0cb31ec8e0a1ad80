"""From prompts to rollouts: engines, agent-loop workers and the manager that the trainer talks to.

::

    AgentLoopManager (driver) --rows--> AgentLoopWorker 0..W-1 (Ray actors, one asyncio task per conversation)
            |                                   |  generate(token_ids), to the least busy replica
            |  launch, weights, sleep           v
            +---------------------------> RolloutReplica 0..N-1 (Ray actors, one engine each)

In: prompts as a ``DataProto`` (``uid``, and ``raw_prompt`` or ``prompt_ids``). Out: the rollout's keys alone
(``verl/protocol.py``), rows in the order of the prompts; ``meta_info["metrics"]`` has the batch's figures.

Beside this module only ``servers`` knows Ray; the public names here are verl's.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedTokenizerBase

from verl.config import HFModelConfig, PPOConfig
from verl.experimental.agent_loop.base import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    RolloutError,
    register,
)
from verl.experimental.agent_loop.placement import ReplicaPlace, plan_replicas
from verl.experimental.agent_loop.rows import summarise
from verl.experimental.agent_loop.sampling import SEED_KEY, sample_seeds
from verl.experimental.agent_loop.servers import AsyncLLMServerManager, Replica
from verl.experimental.agent_loop.worker import AgentLoopWorker, WorkerResult, load_tools
from verl.protocol import DataProto
from verl.single_controller.ray.calls import Remote, as_they_come, collect, disk_full_text
from verl.utils.row_buffer import RowBuffer
from verl.utils.tokenizer import hf_tokenizer
from verl.weight_sync.sync import WeightSource, send_weights
from verl.workers.rollout.replica import RolloutReplica, get_replica_class

__all__ = [
    "AgentLoopBase",
    "AgentLoopManager",
    "AgentLoopOutput",
    "AgentLoopWorker",
    "AsyncLLMServerManager",
    "RolloutError",
    "register",
]

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0


class PlacedGroup(Protocol):
    """The part of a worker group that says where its ranks run."""

    def get_placement(self) -> list[dict[str, Any]]: ...


class AgentLoopManager:
    """The trainer's side: starts engines and workers, generates, and carries weights to the engines."""

    def __init__(
        self,
        config: PPOConfig,
        worker_group: PlacedGroup | None = None,
        *,
        device: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        replica_class: type[RolloutReplica] | None = None,
    ) -> None:
        """Plan the replicas and check the tools; start nothing.

        Args:
            worker_group: the training ranks, whose nodes and GPUs the replicas share; None: one replica, on this node.
            device: ``cpu`` or ``cuda``.
            tokenizer: the student's; None: loaded from ``actor_rollout_ref.model``.
            replica_class: the engine; None: the one that ``rollout.name`` names.

        Raises:
            ValueError: a tool cannot be loaded, or the ranks do not divide into replicas.
        """
        self.config = config
        self.rollout = config.actor_rollout_ref.rollout
        self.device = device
        self.asleep = False
        """Whether the engines have given up their memory; only a weight sync brings them back."""
        self.weight_version: int | None = None
        """Version of the last weight sync; None before the first."""
        self.watch: Callable[[], None] | None = None
        """Called now and then while engines and workers are waited for: what it raises ends the wait."""
        self._tokenizer = tokenizer or _load_tokenizer(config.actor_rollout_ref.model)
        self._replica_class = replica_class or get_replica_class(self.rollout.name)
        placements = worker_group.get_placement() if worker_group else [_this_node()]
        self._places = plan_replicas(placements, device, self.rollout.tensor_model_parallel_size)
        self._with_tools = bool(load_tools(self.rollout))
        self._replicas: list[Replica] = []
        self._workers: list[Remote] = []
        self._launching: dict[Any, Remote] = {}

    def start(self) -> None:
        """Begin to launch engines and workers, all at once; returns at once."""
        self._replicas = [self._create_replica(place) for place in self._places]
        self._launching = {replica.actor.launch.remote(): replica for replica in self._replicas}
        count = max(1, min(self.rollout.agent.num_workers, int(ray.cluster_resources().get("CPU", 1))))
        tokenizer = ray.put(self._tokenizer)
        self._workers = [self._create_worker(index, count, tokenizer) for index in range(count)]
        self._launching |= {worker.actor.finished_rows.remote(): worker for worker in self._workers}

    def wait_ready(self) -> None:
        """Wait until every engine and worker has started.

        Raises:
            RolloutError: one could not; named, with the cause.
        """
        collect(self._launching, "start", watch=self._look)
        self._launching = {}

    def check_alive(self) -> None:
        """Raise ``RolloutError`` where the process of an engine or a worker has died; returns at once."""
        for remote in (*self._replicas, *self._workers):
            remote.check_alive()

    def generate_sequences(self, prompts: DataProto, progress: Callable[[int, int], None] | None = None) -> DataProto:
        """Answer every prompt.

        Args:
            prompts: ``uid`` and ``raw_prompt`` or ``prompt_ids`` per row; ``meta_info`` with ``global_steps`` and
                ``validate``.
            progress: called now and then with the rows finished and the rows in all.

        Returns:
            The rollout's new keys, in the order of ``prompts``.

        Raises:
            ValueError: a prompt or an agent name cannot be used.
            RolloutError: an engine or a worker failed, or samples from other weights than the last sync's.
        """
        if self.asleep:
            raise RolloutError("the engines sleep and have no weights; call update_weights before generate_sequences")
        rows = self._rows_to_send(prompts)
        parts = np.array_split(np.arange(len(rows)), min(len(self._workers), len(rows)))
        workers = self._workers[: len(parts)]
        try:
            calls = {
                worker.actor.generate_sequences.remote(rows[part[0] : part[-1] + 1]): worker
                for worker, part in zip(workers, parts, strict=True)
            }
        except (OutOfDiskError, ObjectStoreFullError) as error:
            raise RolloutError(f"the agent-loop workers could not be given their rows: {disk_full_text()}") from error
        report = partial(self._report_progress, workers, progress, len(rows)) if progress else None
        buffer, versions = RowBuffer(len(rows)), set[int]()
        metrics: dict[int, list[AgentLoopMetrics]] = {}
        result: WorkerResult
        for index, result in as_they_come(calls, "generate", watch=self._look, report=report):
            buffer.put(int(parts[index][0]), result.rows)
            metrics[index], versions = result.metrics, versions | result.weight_versions
            del result
        self._check_versions(versions)
        generated = buffer.take()
        in_order = [row for index in sorted(metrics) for row in metrics[index]]
        generated.meta_info = {"metrics": summarise(in_order, self._with_tools)}
        return generated

    def update_weights(self, worker_group: WeightSource, version: int) -> None:
        """Send the training ranks' weights to every engine, which also wakes the engines; see ``verl.weight_sync``.

        Raises:
            RolloutError: an engine failed or did not get every tensor; named, with the cause.
        """
        engines = [replica.actor for replica in self._replicas]
        send_weights(worker_group, engines, [place.ranks for place in self._places], self._wait, version)
        self.asleep = False
        self.weight_version = version

    def sleep(self) -> None:
        """Give the engines' memory to training, where they hold any that training wants; a weight sync wakes them."""
        if self.device == "cuda" and self.rollout.free_cache_engine:
            self._wait("sleep", [replica.actor.sleep.remote() for replica in self._replicas])
            self.asleep = True

    def shutdown(self) -> None:
        """End engines and workers; safe to call at any time, and twice."""
        calls = {replica.actor.shutdown.remote(): replica for replica in self._replicas}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=_SHUTDOWN_S) if calls else ([], [])
        for call in done:
            try:
                ray.get(call)
            except RayActorError:
                logger.debug("%s was dead before it could be shut down", calls[call].name)
            except RayError as error:
                account = calls[call].account_of(error, calls[call].log())
                logger.warning("%s failed to shut down: %s", calls[call].name, account)
        for call in late:
            logger.warning("%s did not shut down within %.0f s and is killed", calls[call].name, _SHUTDOWN_S)
        for remote in (*self._workers, *self._replicas):
            ray.kill(remote.actor)
        self._replicas, self._workers, self._launching = [], [], {}

    def _create_replica(self, place: ReplicaPlace) -> Replica:
        environment = {}
        if place.cuda_visible_devices is not None:
            # The GPUs belong to the training ranks; without the second entry Ray could hide them from the replica.
            environment = {
                "CUDA_VISIBLE_DEVICES": place.cuda_visible_devices,
                "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
            }
        actor_class = ray.remote(self._replica_class).options(
            num_cpus=0,
            num_gpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
            runtime_env={"env_vars": environment},
        )
        model = self.config.actor_rollout_ref.model
        actor = actor_class.remote(self.rollout, model, place.index, self.device)
        name = f"rollout replica {place.index} ({self.rollout.name}, node {place.node_ip})"
        replica = Replica(name, actor, place.node_ip)
        replica.ask_for_log()
        return replica

    def _create_worker(self, index: int, count: int, tokenizer: Any) -> Remote:
        """Workers begin with replicas evenly apart, so that few workers keep many replicas busy, each on its node."""
        first = index * len(self._places) // count
        place = self._places[first]
        worker_class = ray.remote(AgentLoopWorker).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        )
        servers = AsyncLLMServerManager(self._replicas, first, self.rollout.timeout_s)
        actor = worker_class.remote(self.config, tokenizer, servers)
        worker = Remote(f"agent-loop worker {index} (node {place.node_ip})", actor, place.node_ip)
        worker.ask_for_log()
        return worker

    def _look(self) -> None:
        """Look at engines and workers, whoever is waited for, and at the rest of the run."""
        self.check_alive()
        if self.watch is not None:
            self.watch()

    def _rows_to_send(self, prompts: DataProto) -> DataProto:
        if "prompt_ids" not in prompts.non_tensor_batch:
            prompts.require("raw_prompt")
        seeds = sample_seeds(self.rollout.seed, prompts)
        return DataProto.from_dict(
            non_tensors={**prompts.non_tensor_batch, SEED_KEY: np.array(seeds, dtype=object)},
            meta_info={"validate": prompts.meta_info["validate"]},
        )

    def _check_versions(self, versions: set[int]) -> None:
        if self.weight_version is not None and versions != {self.weight_version}:
            raise RolloutError(
                f"the engines sampled from weights of versions {sorted(versions)} after the sync of version "
                f"{self.weight_version}"
            )

    def _report_progress(self, workers: Sequence[Remote], progress: Callable[[int, int], None], total: int) -> None:
        counts = {worker.actor.finished_rows.remote(): worker for worker in workers}
        progress(sum(collect(counts, "report progress")), total)

    def _wait(self, task: str, calls: Sequence[Any]) -> None:
        """Wait for one call per replica."""
        waiting = dict(zip(calls, self._replicas, strict=True))
        collect(waiting, task, watch=self._look, timeout_s=self.rollout.timeout_s)


def _load_tokenizer(model: HFModelConfig) -> PreTrainedTokenizerBase:
    path = model.tokenizer_path or model.path
    if path is None:
        raise ValueError("actor_rollout_ref.model.path is not set; give the folder or hub name of the model")
    return hf_tokenizer(path, model.trust_remote_code)


def _this_node() -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    return {"rank": 0, "local_rank": 0, "node_id": node_id, "node_ip": ray.util.get_node_ip_address()}

"""From prompts to rollouts: engines, agent-loop workers and the manager that the trainer talks to.

::

    AgentLoopManager (driver) --rows--> AgentLoopWorker 0..W-1 (one asyncio task per conversation)
            |                                   |  token ids, to the least busy replica
            |  launch, weights, sleep           v
            +---------------------------> RolloutReplica 0..N-1 (one engine each)

In: prompts as a ``DataProto`` (``uid``, and ``raw_prompt`` or ``prompt_ids``). Out: the rollout's keys alone
(``verl/protocol.py``), rows in the order of the prompts; ``meta_info["metrics"]`` has the batch's metrics.

Workers and replicas are Ray actors, or objects of the calling process. Both are called alike:
``handle.actor.method.remote(...)`` begins a call, and ``as_they_come`` yields the results of calls. Replicas share the
devices and nodes of the student's ranks, so they ask Ray for nothing: a node and, on CUDA, device ids. Where they have
a pool, they ask for its share. Ranks of other pools, such as a teacher's, do not come in: their GPUs are their own. The
public names here are verl's.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.experimental.agent_loop.actors import LocalActors, RayActors, plan_apart, plan_replicas
from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, RolloutError, register
from verl.experimental.agent_loop.worker import (
    SEED_KEY,
    AgentLoopWorker,
    AsyncLLMServerManager,
    batch_metrics,
    sample_seeds,
)
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.single_controller.base.decorator import RowBuffer
from verl.single_controller.ray.calls import Remote, finished, sending
from verl.single_controller.ray.resource_pool import RayResourcePool
from verl.weight_sync import broadcast_weights, send_weights
from verl.workers.rollout.replica import get_replica_class

__all__ = ["AgentLoopBase", "AgentLoopOutput", "AgentLoopWorker", "AsyncLLMServerManager", "register"]  # verl's names

logger = logging.getLogger(__name__)


class AgentLoopManager:
    """The trainer's side: starts engines and workers, generates, and carries weights to the engines."""

    def __init__(
        self,
        config: PPOConfig,
        worker_group: WorkerGroup,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str,
        watch: Callable[[], None],
        pool: RayResourcePool | None = None,
        in_process: bool = False,
    ) -> None:
        """Plan the replicas; start nothing.

        Args:
            worker_group: the training ranks, whose nodes and GPUs the replicas share unless they have a ``pool``.
            tokenizer: the student's.
            device: ``cpu`` or ``cuda``.
            watch: called after every half second without a result of engines or workers; what it raises ends the wait.
            in_process: run one engine and one worker in this process, without Ray; on CPU alone.
        """
        self.config = config
        self.rollout = config.actor_rollout_ref.rollout
        self.device = device
        self.asleep = False
        """Whether the engines have given up their memory, or not read the weights yet; a weight sync is due."""
        self.weight_version: int | None = None
        """Version of the last weight sync; None before the first."""
        self._tokenizer = tokenizer
        self._watch = watch
        self._actors = LocalActors() if in_process else RayActors()
        # In one process nothing but the engine could answer a request, so it has all the time it takes.
        self._request_timeout_s = None if in_process else self.rollout.timeout_s
        gpus, engines = self.rollout.tensor_model_parallel_size, 1 if in_process else self.rollout.cpu_engines
        self._places = (
            plan_replicas(worker_group.get_placement(), device, gpus, engines)
            if pool is None
            else plan_apart(pool, gpus if device == "cuda" else 1)
        )
        self._replicas: list[Remote] = []
        self._workers: list[Remote] = []
        self._starting: dict[Any, Remote] = {}
        self._began_s = 0.0

    def start(self) -> None:
        """Begin to start engines and workers, all at once; returns at once."""
        replica_class = get_replica_class(self.rollout.name)
        self._began_s = time.monotonic()
        logger.info("starting %d %s engine(s)", len(self._places), self.rollout.name)
        rollout = dataclasses.replace(
            self.rollout,
            stop_at_extended_token=self.config.stops_at_extended,
            free_cache_engine=self._frees_memory,
            cpu_engines=self.config.trainer.rollout_n_gpus_per_node or self.rollout.cpu_engines,
        )
        if self._frees_memory:
            # A sync comes before the first answer, and brings all weights: vLLM need not read them.
            own = rollout.engine_kwargs.get("vllm", {})
            rollout.engine_kwargs = {**rollout.engine_kwargs, "vllm": {"load_format": "dummy", **own}}
            self.asleep = True
        for place in self._places:
            name = f"rollout replica {place.index} ({self.rollout.name}, node {place.node_ip})"
            arguments = (rollout, self.config.actor_rollout_ref.model, place.index, self.device, not place.ranks)
            self._replicas.append(self._actors.create(name, place, replica_class, *arguments, **place.options))
        self._starting = {replica.actor.launch.remote(): replica for replica in self._replicas}
        count = max(1, min(self.rollout.agent.num_workers, self._actors.max_workers))
        self._workers = [self._create_worker(index, count) for index in range(count)]
        self._starting |= {worker.actor.check_alive.remote(): worker for worker in self._workers}

    def wait_ready(self) -> None:
        """Wait until every engine and worker has started.

        Raises:
            RolloutError: one could not; named, with the cause.
        """
        logger.info("waiting for the engines")
        list(self._actors.as_they_come(self._starting, "start", watch=self._check_run))
        logger.info("the engines are ready, %.0f s after their start began", time.monotonic() - self._began_s)

    def check_alive(self) -> None:
        """Raise ``RolloutError`` where the process of an engine or a worker has died; returns at once."""
        for remote in (*self._replicas, *self._workers):
            remote.check_alive()

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Answer every prompt: `begin` and `collect` in one."""
        return self.collect(self.begin(prompts))

    def begin(self, prompts: DataProto) -> "Generation":
        """Have every prompt answered; returns at once. No weight sync may come before ``collect`` has returned.

        Args:
            prompts: ``uid`` and ``raw_prompt`` or ``prompt_ids`` per row, and seeds where these were drawn before;
                ``meta_info`` with ``global_steps``, ``validate`` and, where answers are cut before R tokens,
                ``horizon``. With ``wanted``, so many prompts of ``n`` rows each are answered, and the others cut short.

        Raises:
            WorkerError: there is no space for the prompts.
        """
        columns, wanted, n = prompts.non_tensor_batch, prompts.meta_info.get("wanted", 0), self.rollout.n
        seeds = {SEED_KEY: sample_seeds(self.rollout.seed, prompts)} if SEED_KEY not in columns else {}
        meta_info = {key: prompts.meta_info.get(key) for key in ("validate", "horizon")}
        rows = DataProto.from_dict(None, {**columns, **seeds}, meta_info)
        starts, order = self.starts(len(rows)), None
        if wanted:
            # Prompts go round the workers: carried ones come first, and are the longer ones. Each worker may leave out
            # one at least; it would wait for its longest answer otherwise.
            busy = max(1, min(len(self._workers), wanted, len(rows) // n - wanted))
            dealt = [range(index, len(rows) // n, busy) for index in range(busy)]
            starts = [0, *itertools.accumulate(len(prompts) * n for prompts in dealt)]
            order = [prompt * n + answer for prompts in dealt for prompt in prompts for answer in range(n)]
            rows.reorder(order)
        parts = [rows.slice(first, end) for first, end in itertools.pairwise(starts)]
        for index, part in enumerate(parts if wanted else ()):
            part.meta_info["wanted"] = len(range(index, wanted, len(parts)))
        with sending("generate_sequences"):
            calls = {
                worker.actor.generate_sequences.remote(part): (worker, first)
                for worker, part, first in zip(self._workers, parts, starts, strict=False)
            }
        return Generation(calls, RowBuffer(len(rows)), self.weight_version, order)

    def starts(self, rows: int) -> list[int]:
        """Index of each worker's first row, then the number of rows."""
        busy = min(len(self._workers), rows)
        return [rows * index // busy for index in range(busy + 1)]

    def take(self, generation: "Generation", wait: bool = False) -> None:
        """Take what workers have answered, with ``wait`` all of it, and give it on; errors as of `collect`."""
        taken = list(generation.calls) if wait else finished(generation.calls)
        workers = {call: generation.calls[call][0] for call in taken}
        for number, part in self._actors.as_they_come(workers, "generate", watch=self._check_run):
            _, start = generation.calls.pop(taken[number])
            generation.buffer.put(start, part)
            generation.on_part(start, part)
            del part  # before the next one comes

    def collect(self, generation: "Generation") -> DataProto:
        """Wait for what `begin` began.

        Returns:
            The rollout's new keys, in the order of the prompts, with ``wanted`` also `TAKEN` and `ENDED`;
            ``meta_info["weight_version"]`` of what wrote them.

        Raises:
            WorkerError: an engine or a worker failed, a prompt or an agent name cannot be used (``by_user``), or
                samples come from other weights than those of the last sync before they were begun.
        """
        self.take(generation, wait=True)
        generated = generation.buffer.take()
        if generation.order is not None:
            generated.reorder(np.argsort(generation.order).tolist())
        measured = generated.meta_info["metrics"]
        generation.seconds = max(measured["call_s"])
        versions = set(measured["weight_version"]) - {None}
        # Before the first sync the engines sample from the model that they loaded.
        if generation.version is not None and not versions <= {generation.version}:
            raise RolloutError(
                f"the engines sampled from weights of versions {sorted(versions)} after the sync of version "
                f"{generation.version}"
            )
        metrics = batch_metrics(measured, self.rollout.multi_turn.tool_config_path is not None)
        generated.meta_info = {"metrics": metrics, "weight_version": min(versions, default=generation.version)}
        return generated

    def update_weights(self, worker_group: WorkerGroup, version: int | None = None) -> None:
        """One whole weight sync (``verl.weight_sync``) to every engine, which wakes them too.

        An engine's own ``update_weights`` is one bucket of it.

        Args:
            version: of these weights; None: the one after the last, so that no two syncs have the same.

        Raises:
            RolloutError: an engine failed or did not get every tensor; named, with the cause.
        """
        version = (self.weight_version or 0) + 1 if version is None else version
        engines = [replica.actor for replica in self._replicas]
        if self.config.trainer.rollout_weight_sync == "broadcast":
            if self.weight_version is None:
                self._connect(worker_group)
            broadcast_weights(worker_group, engines, self._wait, version)
        else:
            send_weights(worker_group, engines, [place.ranks for place in self._places], self._wait, version)
        self.asleep = False
        self.weight_version = version

    def _connect(self, worker_group: WorkerGroup) -> None:
        """Have rank 0 and the engines' processes meet."""
        each, timeout_s = self.rollout.tensor_model_parallel_size, self.rollout.timeout_s or 24 * 3600.0
        rendezvous = worker_group.open_channel(1 + each * len(self._replicas), timeout_s)
        firsts = range(1, rendezvous["size"], each)
        calls = [
            replica.actor.connect.remote(rendezvous, first)
            for replica, first in zip(self._replicas, firsts, strict=True)
        ]
        joined = worker_group.begin("join_channel", self.device)
        self._wait("meet rank 0 for weights", calls, joined.check)
        joined()

    def sleep(self) -> None:
        """Give the engines' memory to training, where they hold any that training wants; a weight sync wakes them."""
        if self._frees_memory:
            self._wait("sleep", [replica.actor.sleep.remote() for replica in self._replicas])
            self.asleep = True

    @property
    def _frees_memory(self) -> bool:
        """Whether engines sleep while training runs, so that a weight sync comes before every batch."""
        return self.device == "cuda" and self.rollout.free_cache_engine and bool(self._places[0].ranks)

    def shutdown(self) -> None:
        """End engines and workers; safe to call at any time, and twice."""
        self._actors.shutdown(self._replicas, self._workers)
        self._replicas, self._workers, self._starting = [], [], {}

    def _create_worker(self, index: int, count: int) -> Remote:
        """Workers start at evenly spread replicas, so that few keep many busy, each on the node of its first one."""
        first = index * len(self._places) // count
        place = self._places[first]
        servers = AsyncLLMServerManager(self._replicas, first, self._request_timeout_s)
        arguments = (AgentLoopWorker, self.config, self._tokenizer, servers)
        return self._actors.create(f"agent-loop worker {index} (node {place.node_ip})", place, *arguments)

    def _check_run(self, check: Callable[[], None] = lambda: None) -> None:
        """Check engines, workers and the rest of the run, whichever of them is waited for."""
        check()
        self.check_alive()
        self._watch()

    def _wait(self, task: str, calls: Sequence[Any], check: Callable[[], None] = lambda: None) -> None:
        """Wait for one call per replica, and call ``check`` now and then."""
        waiting, options = dict(zip(calls, self._replicas, strict=True)), {"timeout_s": self.rollout.timeout_s}
        list(self._actors.as_they_come(waiting, task, watch=lambda: self._check_run(check), **options))


@dataclass
class Generation:
    """A batch that workers are answering."""

    calls: dict[Any, tuple[Remote, int]]
    """Calls that have not been taken: the worker, and its first row."""
    buffer: RowBuffer
    """What has been taken."""
    version: int | None
    """Version of the weights when it began; None: those that the engines loaded."""
    order: Sequence[int] | None = None
    """Rows of the prompts in the order of the calls; None: as they come."""
    began_s: float = field(default_factory=time.time)
    seconds: float = 0.0
    """It took so long, by its workers' clocks; known once it is collected."""
    on_part: Callable[[int, DataProto], None] = lambda start, part: None
    """Called with each worker's answers as they are taken, and the first of their rows."""

"""From prompts to rollouts: engines, agent-loop workers and the manager that the trainer talks to.

::

    AgentLoopManager (driver) --rows--> AgentLoopWorker 0..W-1 (one asyncio task per conversation)
            |                                   |  generate(token_ids), to the least busy replica
            |  launch, weights, sleep           v
            +---------------------------> RolloutReplica 0..N-1 (one engine each)

In: prompts as a ``DataProto`` (``uid``, and ``raw_prompt`` or ``prompt_ids``). Out: the rollout's keys alone
(``verl/protocol.py``), rows in the order of the prompts; ``meta_info["metrics"]`` has the batch's metrics.

Workers and replicas are Ray actors, or objects of the calling process. Both are called alike:
``handle.actor.method.remote(...)`` begins a call, and ``as_they_come`` yields the results of calls. Replicas share the
devices and nodes of the student's ranks, so they ask Ray for nothing: a node and, on CUDA, device ids. Ranks of other
pools, such as a teacher's, do not come in: their GPUs are their own. The public names here are verl's.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
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
from verl.single_controller.ray.calls import Remote, as_they_come, sending
from verl.weight_sync import send_weights
from verl.workers.rollout.replica import get_replica_class

__all__ = ["AgentLoopBase", "AgentLoopOutput", "AgentLoopWorker", "AsyncLLMServerManager", "register"]  # verl's names

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""Seconds that all replicas have together to end by themselves."""


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
        in_process: bool = False,
    ) -> None:
        """Plan the replicas; start nothing.

        Args:
            worker_group: the training ranks, whose nodes and GPUs the replicas share.
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
        self._places = plan_replicas(
            worker_group.get_placement(),
            device,
            self.rollout.tensor_model_parallel_size,
            1 if in_process else self.rollout.cpu_engines,
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
        rollout = dataclasses.replace(self.rollout, stop_at_extended_token=self.config.stops_at_extended)
        if self._frees_memory:
            # A sync comes before the first answer, and brings all weights: vLLM need not read them.
            own = rollout.engine_kwargs.get("vllm", {})
            rollout.engine_kwargs = {**rollout.engine_kwargs, "vllm": {"load_format": "dummy", **own}}
            self.asleep = True
        for place in self._places:
            name = f"rollout replica {place.index} ({self.rollout.name}, node {place.node_ip})"
            arguments = (rollout, self.config.actor_rollout_ref.model, place.index, self.device)
            gpus = place.cuda_visible_devices
            self._replicas.append(self._actors.create(name, place, replica_class, *arguments, gpus=gpus))
        self._starting = {replica.actor.launch.remote(): replica for replica in self._replicas}
        count = max(1, min(self.rollout.agent.num_workers, self._actors.max_workers))
        self._workers = [self._create_worker(index, count) for index in range(count)]
        self._starting |= {worker.actor.check_alive.remote(): worker for worker in self._workers}

    def wait_ready(self) -> None:
        """Wait until every engine and worker has started.

        Raises:
            RolloutError: one could not; named, with the cause.
        """
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
            prompts: ``uid`` and ``raw_prompt`` or ``prompt_ids`` per row; ``meta_info`` with ``global_steps``,
                ``validate`` and, where answers are cut before R tokens, ``horizon``.

        Raises:
            WorkerError: there is no space for the prompts.
        """
        seeds = sample_seeds(self.rollout.seed, prompts)
        meta_info = {key: prompts.meta_info.get(key) for key in ("validate", "horizon")}
        rows = DataProto.from_dict(None, {**prompts.non_tensor_batch, SEED_KEY: seeds}, meta_info)
        busy = min(len(self._workers), len(rows))
        starts = [len(rows) * index // busy for index in range(busy + 1)]
        with sending("generate_sequences"):
            calls = {
                worker.actor.generate_sequences.remote(rows.slice(first, end)): worker
                for worker, first, end in zip(self._workers, starts, starts[1:], strict=False)
            }
        return Generation(calls, starts, self.weight_version)

    def collect(self, generation: "Generation") -> DataProto:
        """Wait for what `begin` began.

        Returns:
            The rollout's new keys, in the order of the prompts; ``meta_info["weight_version"]`` of what wrote them.

        Raises:
            WorkerError: an engine or a worker failed, a prompt or an agent name cannot be used (``by_user``), or
                samples come from other weights than those of the last sync before they were begun.
        """
        buffer = RowBuffer(generation.starts[-1])
        for number, part in self._actors.as_they_come(generation.calls, "generate", watch=self._check_run):
            buffer.put(generation.starts[number], part)
            del part  # before the next one comes
        generated = buffer.take()
        measured = generated.meta_info["metrics"]
        generation.seconds = max(measured["call_s"])
        versions = set(measured["weight_version"])
        # Before the first sync the engines sample from the model that they loaded.
        if generation.version is not None and versions != {generation.version}:
            raise RolloutError(
                f"the engines sampled from weights of versions {sorted(versions)} after the sync of version "
                f"{generation.version}"
            )
        metrics = batch_metrics(measured, self.rollout.multi_turn.tool_config_path is not None)
        generated.meta_info = {"metrics": metrics, "weight_version": min(versions)}
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
        send_weights(worker_group, engines, [place.ranks for place in self._places], self._wait, version)
        self.asleep = False
        self.weight_version = version

    def sleep(self) -> None:
        """Give the engines' memory to training, where they hold any that training wants; a weight sync wakes them."""
        if self._frees_memory:
            self._wait("sleep", [replica.actor.sleep.remote() for replica in self._replicas])
            self.asleep = True

    @property
    def _frees_memory(self) -> bool:
        """Whether engines sleep while training runs, so that a weight sync comes before every batch."""
        return self.device == "cuda" and self.rollout.free_cache_engine

    def shutdown(self) -> None:
        """End engines and workers; safe to call at any time, and twice."""
        self._actors.shutdown(self._replicas, self._workers)
        self._replicas, self._workers, self._starting = [], [], {}

    def _create_worker(self, index: int, count: int) -> Remote:
        """Workers begin with replicas evenly apart, so that few workers keep many replicas busy, each on its node."""
        first = index * len(self._places) // count
        place = self._places[first]
        servers = AsyncLLMServerManager(self._replicas, first, self._request_timeout_s)
        arguments = (AgentLoopWorker, self.config, self._tokenizer, servers)
        return self._actors.create(f"agent-loop worker {index} (node {place.node_ip})", place, *arguments)

    def _check_run(self) -> None:
        """Check engines, workers and the rest of the run, whichever of them is waited for."""
        self.check_alive()
        self._watch()

    def _wait(self, task: str, calls: Sequence[Any]) -> None:
        """Wait for one call per replica."""
        waiting = dict(zip(calls, self._replicas, strict=True))
        list(self._actors.as_they_come(waiting, task, watch=self._check_run, timeout_s=self.rollout.timeout_s))


@dataclass
class Generation:
    """A batch that workers are answering."""

    calls: Mapping[Any, Remote]
    starts: Sequence[int]
    """First row of each call, and the number of all rows."""
    version: int | None
    """Of the weights when it began; None: those that the engines loaded."""
    began_s: float = field(default_factory=time.time)
    seconds: float = 0.0
    """It took so long, by its workers' clocks; known once it is collected."""


# ------------------------------------------------------------------ where replicas and workers run


@dataclass(frozen=True)
class ReplicaPlace:
    """One replica's node and GPUs."""

    index: int
    node_id: str
    node_ip: str
    cuda_visible_devices: str | None
    """Comma-separated device ids; None on CPU."""
    ranks: tuple[int, ...]
    """The student's ranks beside it: on CUDA those whose GPUs it uses, on CPU all of the node."""


def plan_replicas(
    placements: Sequence[Mapping[str, Any]], device: str, gpus_per_replica: int, cpu_engines: int = 1
) -> list[ReplicaPlace]:
    """On CPU ``cpu_engines`` replicas per node; on CUDA one per ``gpus_per_replica`` consecutive ranks of a node.

    Args:
        placements: per rank ``rank``, ``local_rank``, ``node_id``, ``node_ip``, ``cuda_visible_devices``.
        device: ``cpu`` or ``cuda``.
    """
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for placement in sorted(placements, key=lambda placement: placement["rank"]):
        nodes.setdefault(placement["node_id"], []).append(placement)
    places: list[ReplicaPlace] = []
    for node_id, ranks in nodes.items():
        neighbours = [ranks[first : first + gpus_per_replica] for first in range(0, len(ranks), gpus_per_replica)]
        for beside in [ranks] * cpu_engines if device == "cpu" else neighbours:
            numbers = tuple(rank["rank"] for rank in beside)
            gpus = None if device == "cpu" else ",".join(map(_gpu_of, beside))
            places.append(ReplicaPlace(len(places), node_id, beside[0]["node_ip"], gpus, numbers))
    return places


def _gpu_of(rank: Mapping[str, Any]) -> str:
    # Several ids: the rank sees all GPUs of its node and uses the one of its local rank.
    devices: list[str] = rank["cuda_visible_devices"].split(",")
    return devices[0] if len(devices) == 1 else devices[rank["local_rank"]]


class RayActors:
    """Every object in a process of its own; an error names the process, the cause and its log."""

    as_they_come = staticmethod(as_they_come)

    def __init__(self) -> None:
        self.max_workers = int(ray.cluster_resources().get("CPU", 1))
        """As many as the cluster has CPUs."""

    def create(
        self, name: str, place: ReplicaPlace, made_class: type, *arguments: Any, gpus: str | None = None
    ) -> Remote:
        """An actor on the node of ``place`` that sees ``gpus`` (device ids)."""
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
        if gpus is not None:
            # The GPUs belong to the training ranks; without the second entry Ray could hide them from the actor.
            visible = {"CUDA_VISIBLE_DEVICES": gpus, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options["runtime_env"] = {"env_vars": visible}
        on_node = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        actor_class = ray.remote(made_class).options(scheduling_strategy=on_node, **options)
        actor = Remote(name, actor_class.remote(*arguments), place.node_ip)
        actor.ask_for_log()
        return actor

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Let the replicas end by themselves, then kill everything."""
        calls = {replica.actor.shutdown.remote(): replica for replica in replicas}
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=SHUTDOWN_S) if calls else ([], [])
        for call in done:
            try:
                ray.get(call)
            except RayError as error:
                # A run often ends because one is dead, which was reported.
                level = logging.DEBUG if isinstance(error, RayActorError) else logging.WARNING
                logger.log(level, "%s failed to shut down: %s", calls[call].name, error)
        for call in late:
            logger.warning("%s did not shut down within %.0f s and is killed", calls[call].name, SHUTDOWN_S)
        for remote in (*workers, *replicas):
            ray.kill(remote.actor)


class LocalActor:
    """An object called as a Ray actor is: ``actor.method.remote(...)`` begins an async method on the event loop."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, method: str) -> Any:
        function = getattr(self._target, method)
        # A task runs as soon as the loop does, as a Ray call begins by itself; a bare coroutine waits for its await.
        return SimpleNamespace(remote=lambda *arguments: self._loop.create_task(function(*arguments)))


class LocalActors:
    """Every object in this process, on one event loop that runs while calls are waited for; an error is the object's
    own. On CPU alone: on a GPU, engine and training would have to take turns with its memory.
    """

    max_workers = 1

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def create(
        self, name: str, place: ReplicaPlace, made_class: type, *arguments: Any, gpus: str | None = None
    ) -> Remote:
        """An object of this process; there are no ``gpus``."""
        return Remote(name, LocalActor(made_class(*arguments), self._loop), place.node_ip)

    def as_they_come(self, calls: Mapping[Any, Remote], doing: str, **options: Any) -> Iterator[tuple[int, Any]]:
        """Numbers and results of the calls; the first to fail ends the wait with its own error."""
        for number, call in enumerate(calls):
            # The loop runs all calls meanwhile, whichever is waited for.
            yield number, self._loop.run_until_complete(call)

    def shutdown(self, replicas: Sequence[Remote], workers: Sequence[Remote]) -> None:
        """Stop what still runs, then the engines."""
        # They end while the loop runs the shutdowns below.
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        for replica in replicas:
            self._loop.run_until_complete(replica.actor.shutdown.remote())
        self._loop.close()

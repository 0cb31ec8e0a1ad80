"""The ranks of each role: the resource pools, and the worker groups that run in them.

::

    co-located        pool "train"     rank r: actor + ref          (one process, one process group)
    teacher apart     pool "train"     rank r: actor                (a process group of its own)
                      pool "teacher"   rank s: ref                  (a process group of its own)
    teacher served    pool "teacher"   vLLM servers alone           (no ranks; teachers that are models co-located)
    engines apart     pool "rollout"   rollout engines alone        (no ranks)

In: the settings and the worker class of each role. Out: a group per role, whose methods the trainer calls.
Rollout engines are placed beside the student's ranks (``agent_loop``) unless they have a pool; what has a pool of its
own has its GPUs alone.

Before the first worker starts on a cluster, ``check_nodes`` asks every node for what is read there:

==================================  ===================================================================
student's ranks, engines            student's model and tokenizer; ranks the checkpoint to resume from
agent-loop workers beside engines   the configuration of tools and agent loops
teachers' ranks                     the teachers' models and tokenizer
driver alone                        data files, reward function: checked before Ray starts
==================================  ===================================================================
"""

import logging
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from verl.config import BASE_TEACHER, PPOConfig
from verl.config.ppo import teacher_key
from verl.experimental.agent_loop.actors import LocalActors, Place, RayActors, plan_apart
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Call, Results, WorkerGroup
from verl.single_controller.base.worker import LOOPBACK
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.single_controller.ray.base import RoleWorkerGroup
from verl.single_controller.ray.calls import Remote
from verl.single_controller.ray.node_check import DISTRIBUTIONS, check_nodes_hold
from verl.single_controller.ray.resource_pool import RankPlace, reserve_all
from verl.trainer.checkpoint import layout as checkpoint
from verl.utils.loopback import joins_cluster
from verl.workers.rollout.vllm_settings import server_options
from verl.workers.served_teacher import ServedTeacher, StitchedGroup
from verl.workers.teacher_servers import TeacherServers, VLLMServer

logger = logging.getLogger(__name__)

TRAIN, TEACHER, ROLLOUT = "train", "teacher", "rollout"


class LocalWorkerGroup(WorkerGroup):
    """One worker, rank 0 of 1, in this process. A call runs at once, and an error is the worker's own."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(type(worker), world_size=1)
        self._worker = worker

    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        return [(rank, getattr(self._worker, method)(*call.args, **call.kwargs)) for rank, call in enumerate(calls)]


class WorkerGroups:
    """The pools of a run, and one worker group per pool; roles that share a pool share its processes.

    Args:
        roles: ``actor``, then those of its frozen models.

    Raises:
        ValueError: a pool for a teacher that the run does not use.
    """

    _actors: RayActors | LocalActors
    """Of the servers, once they are started."""

    def __init__(self, config: PPOConfig, roles: Sequence[str]) -> None:
        self._config = config
        self._served = [role for role in roles if role in config.served_roles]
        self._engines = [role for role in roles if role in config.engine_roles]
        roles = [role for role in roles if role not in self._served]
        run, teacher = config.trainer, config.trainer.teacher_ranks_on_nodes
        if teacher and len(roles) == 1 and not self._engines:
            given = f"teacher_nnodes={run.teacher_nnodes}, teacher_n_gpus_per_node={run.teacher_n_gpus_per_node}"
            raise ValueError(f"trainer.{given}: this run uses no teacher of its own; set both to null")
        self.pools = {TRAIN: RayResourcePool([run.n_gpus_per_node] * run.nnodes, name_prefix=TRAIN)}
        """By name; their places are reserved at the start."""
        if teacher:
            keys = "trainer.teacher_n_gpus_per_node or trainer.teacher_nnodes"
            self.pools[TEACHER] = RayResourcePool(teacher, name_prefix=TEACHER, settings=keys)
        if run.rollout_gpus_on_nodes:
            keys = "trainer.rollout_n_gpus_per_node or trainer.rollout_nnodes"
            self.pools[ROLLOUT] = RayResourcePool(run.rollout_gpus_on_nodes, name_prefix=ROLLOUT, settings=keys)
        apart = (self._engines or roles[1:]) if teacher else []  # a server has its GPUs alone
        self.pool_of = {role: TEACHER if role in apart else TRAIN for role in [*roles, *self._engines]}
        """The pool of each role that runs here."""
        self._groups: list[RayWorkerGroup] = []
        self._servers: list[Remote] = []

    def start(
        self, worker_classes: Mapping[str, type], arguments_of: Callable[[str], Mapping[str, Any]], device_name: str
    ) -> dict[str, RoleWorkerGroup]:
        """Start every rank of every role; returns while the processes still start.

        Args:
            worker_classes: by role; served teachers are built in this process, roles that the run lacks are left out.
            arguments_of: what each role's workers are built with.
            device_name: ``cuda``: one GPU per rank; or ``cpu``.

        Raises:
            ValueError: the cluster cannot hold them, something else keeps what they need, or a node lacks what they
                will read.
        """
        for pool in self.pools.values():
            pool.use_gpu = device_name == "cuda"
        reserve_all(list(self.pools.values()))
        if joins_cluster(self._config.ray_kwargs.ray_init):
            check_nodes(self._config, self)
        views: dict[str, RoleWorkerGroup] = {}
        for name, pool in self.pools.items():
            roles = [role for role, pool_of_role in self.pool_of.items() if pool_of_role == name]
            logger.info("pool %s: %s, for %s", name, pool.describe(), " and ".join(roles) or "engines")
            roles = [role for role in roles if role not in self._served]
            if not roles:
                continue
            classes = {role: RayClassWithInitArgs(worker_classes[role], **arguments_of(role)) for role in roles}
            ranks = self._config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
            group = RayWorkerGroup(pool, classes, name_prefix=name, ranks_per_share=ranks)
            self._groups.append(group)
            views |= group.spawn(set(roles))
        places: list[Place] = []
        if self._engines:
            self._actors, first = RayActors(), self.pools[TRAIN].reserve()[0]
            places = [Place(0, first.node_id, first.node_ip, None, ())] * len(self._engines)
            if TEACHER in self.pools:
                places = plan_apart(self.pools[TEACHER], self._config.gpus_per_server if device_name == "cuda" else 1)
        return self._with_served(views, worker_classes, arguments_of, places, device_name)

    def start_in_process(
        self, worker_classes: Mapping[str, type], arguments_of: Callable[[str], Mapping[str, Any]], device_name: str
    ) -> dict[str, LocalWorkerGroup]:
        """One rank of every role in this process, without Ray; arguments as in `start`.

        Raises:
            ValueError: the run has a GPU, several ranks, a second pool, or ``trainer.max_staleness``.
        """
        run = self._config.trainer
        if device_name != "cpu" or run.world_size != 1 or len(self.pools) > 1 or run.max_staleness:
            raise ValueError(
                f"a run in one process has one rank on the CPU, which takes turns with its engine: set trainer.device="
                f"{device_name} to cpu, trainer.nnodes={run.nnodes} and trainer.n_gpus_per_node={run.n_gpus_per_node} "
                f"to 1, trainer.teacher_n_gpus_per_node={run.teacher_n_gpus_per_node} and "
                f"trainer.rollout_n_gpus_per_node={run.rollout_n_gpus_per_node} to null, "
                f"trainer.max_staleness={run.max_staleness} to 0"
            )
        roles = [role for role in self.pool_of if role not in self._served]
        workers: dict[str, Worker] = {role: worker_classes[role](**arguments_of(role)) for role in roles}
        for worker in workers.values():
            # Each keeps its own store: handles are functions here, which any store of the process can call.
            worker.attach(workers, worker.object_store)
        groups = {role: LocalWorkerGroup(worker) for role, worker in workers.items()}
        places = [Place(0, "", LOOPBACK, None, ())] * len(self._engines)
        if places:
            self._actors = LocalActors()
        return self._with_served(groups, worker_classes, arguments_of, places, device_name)

    def _with_served(
        self,
        groups: Mapping[str, Any],
        worker_classes: Mapping[str, type],
        arguments_of: Callable[[str], Any],
        places: Sequence[Place],
        device_name: str,
    ) -> dict[str, Any]:
        """The groups together with the served teachers, by role; the run's own servers begin to start."""
        groups = {**groups, **{role: worker_classes[role](**arguments_of(role)) for role in self._served}}
        for number, role in enumerate(self._engines):
            self._serve(role, groups[role], places[number :: len(self._engines)], device_name)
        if BASE_TEACHER in self._served:
            teachers = self._config.algorithm.distill.teachers.items()
            base, stitched = groups[BASE_TEACHER], [role for role, teacher in teachers if teacher.is_stitched]
            groups |= {role: StitchedGroup(base, groups[role]) for role in stitched}
        return groups

    def _serve(self, role: str, served: ServedTeacher, places: Sequence[Place], device_name: str) -> None:
        """Begin to start servers of a teacher, which waits for them when it is initialised."""
        models, key, actors = self._config.actor_rollout_ref, secrets.token_hex(16), self._actors
        options = server_options(models, self._config.teachers[role], served.limits, device_name)
        calls: dict[Any, Remote] = {}
        for place in places:
            name, arguments = f"server of teacher {role} (node {place.node_ip})", (options, models.rollout, device_name)
            server = actors.create(name, place, VLLMServer, place.node_ip, *arguments, key, **place.options)
            self._servers.append(server)
            calls[server.actor.launch.remote()] = server

        def wait() -> TeacherServers:
            logger.info("waiting for %d server(s) of teacher %s", len(calls), role)
            urls = [url for _, url in sorted(actors.as_they_come(calls, "start", watch=self.check_alive))]
            fix = f"the run starts them: see their log, and change {teacher_key(role)}.engine_kwargs if it is these"
            return TeacherServers(urls, key, models.rollout.timeout_s, fix)

        served.expect_servers(wait)

    def places(self, role: str) -> list[RankPlace]:
        """Where each rank of a role, or each engine of the pool ``role``, will run, in order; already reserved."""
        return self.pools[self.pool_of.get(role, role)].reserve()

    @property
    def engine_pool(self) -> RayResourcePool | None:
        """Where engines with GPUs of their own run; None: beside the student's ranks."""
        return self.pools.get(ROLLOUT)

    def check_alive(self) -> None:
        """Raise ``WorkerError`` where a process of any group has died; returns at once."""
        for group in self._groups:
            group.check_alive()

    def watch(self, others: Callable[[], None]) -> None:
        """While a call of one group runs, check now and then that the other groups live, and call ``others``."""

        def check() -> None:
            self.check_alive()
            others()

        for group in self._groups:
            group.watch = check

    def shutdown(self) -> None:
        """End the processes and give their places back, used or not; a second call does nothing."""
        if self._servers:
            self._actors.shutdown(self._servers, [])
            self._servers = []
        for group in self._groups:
            group.shutdown()
        for pool in self.pools.values():
            pool.remove()


def check_nodes(config: PPOConfig, groups: WorkerGroups) -> None:
    """Check that every node of the run has what its processes will read, and the driver's code and packages.

    Raises:
        ValueError: what is missing or differs, and where.
    """
    models = config.actor_rollout_ref
    is_used = {"vllm": models.rollout.name == "vllm" or bool(config.engine_roles), "peft": models.model.lora_rank > 0}
    packages = [name for name in DISTRIBUTIONS if is_used.get(name, True)]
    trainer, student, engines = config.trainer, student_paths(config), student_paths(config)
    del engines["trainer.resume_from_path"]  # they get weights before they write
    node_ips: dict[str, str] = {}
    needed: dict[str, dict[str, str]] = {}
    with ExitStack() as stack:
        if trainer.saves_checkpoints or checkpoint.find_checkpoint(trainer) is not None:
            # Ranks write or read checkpoints side by side in the run's folder: all have to see this file in it.
            folder = Path(trainer.default_local_dir).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            # It is deleted when it is closed, so it stays open until every node has answered.
            marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-nodes-"))
            student["trainer.default_local_dir (the driver's file in it)"] = marker.name
        for role in [*groups.pool_of, *([ROLLOUT] if groups.engine_pool else [])]:
            paths = student if role == "actor" else engines if role == ROLLOUT else teacher_paths(config)
            for place in groups.places(role):
                node_ips[place.node_id] = place.node_ip
                needed.setdefault(place.node_id, {}).update({key: path for key, path in paths.items() if path})
        check_nodes_hold(needed, node_ips, packages)


def student_paths(config: PPOConfig) -> dict[str, str | None]:
    """By setting, what the student's ranks, the engines and the agent-loop workers read."""
    models, trainer = config.actor_rollout_ref, config.trainer
    return {
        "actor_rollout_ref.model.path": models.model.path,
        "actor_rollout_ref.model.tokenizer_path": models.model.tokenizer_path,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": models.rollout.multi_turn.tool_config_path,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": models.rollout.agent.agent_loop_config_path,
        "trainer.resume_from_path": trainer.resume_from_path if trainer.resume_mode == "resume_path" else None,
    }


def teacher_paths(config: PPOConfig) -> dict[str, str | None]:
    """By setting, what the teachers' ranks read; one without a path is the student's starting weights."""
    model, teachers = config.actor_rollout_ref.ref.model, config.algorithm.distill.teachers
    own = {role: teacher for role, teacher in teachers.items() if not teacher.url}
    paths = {f"algorithm.distill.teachers.{role}.path": teacher.path for role, teacher in own.items()}
    if not config.actor_rollout_ref.ref.url:
        paths |= {"actor_rollout_ref.ref.model.path": model.path}
    if not all(paths.values()):
        paths |= {key: path for key, path in student_paths(config).items() if ".model." in key}
    served = config.actor_rollout_ref.ref.url  # the driver reads its tokenizer
    return paths if served else paths | {"actor_rollout_ref.ref.model.tokenizer_path": model.tokenizer_path}

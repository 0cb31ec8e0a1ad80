"""Worker groups on Ray.

    driver                                   rank r (one Ray actor, one process)
    RayWorkerGroup ── WorkerHost.call ─────► {"actor": StudentWorker, "ref": TeacherWorker}
      spawn() ──► a view per role

Each rank's process is a ``WorkerHost``. It holds one instance per role, so that co-located roles share the process,
its device and its process group. A rank's place (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``,
``MASTER_ADDR``, ``MASTER_PORT``) is in its environment before anything is imported. Dead ranks are reported, never
restarted.
"""

import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from verl.single_controller.base.decorator import Call, Results, by_rank
from verl.single_controller.base.worker import LOOPBACK, Worker
from verl.single_controller.base.worker_group import WorkerError, WorkerGroup
from verl.single_controller.ray.calls import Ranks, disk_full_text
from verl.single_controller.ray.resource_pool import RankPlace, RayResourcePool

QUIET_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "NCCL_DEBUG": "WARN",
}
"""Keeps libraries from writing the same lines once per rank; what the user sets wins."""
NOSET_VARIABLE = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Where this is set, Ray shows every GPU of the node to every actor."""


class RayClassWithInitArgs:
    """A worker class (plain or wrapped by ``ray.remote``) and the arguments each rank builds it with."""

    def __init__(self, cls: Any, *args: Any, **kwargs: Any) -> None:
        metadata = getattr(cls, "__ray_metadata__", None)
        self.cls: type = metadata.modified_class.__ray_actor_class__ if metadata else cls
        self.args = args
        self.kwargs = kwargs


def create_colocated_worker_cls(class_dict: Mapping[str, RayClassWithInitArgs]) -> dict[str, RayClassWithInitArgs]:
    """Put one instance of each role, built in this order, into every rank's process."""
    if not class_dict:
        raise ValueError("create_colocated_worker_cls needs at least one role")
    return dict(class_dict)


class RayObjectStore:
    """Ray's own: handles are object references, which Ray counts, and a value stays on its node until it is fetched."""

    def put(self, value: Any) -> ray.ObjectRef:
        """See ``base.worker.ObjectStore``."""
        return ray.put(value)

    def get(self, handles: Sequence[ray.ObjectRef]) -> list[Any]:
        """See ``base.worker.ObjectStore``."""
        return ray.get(list(handles))


class WorkerHost:
    """The actor: builds the roles of one rank and runs their methods, one at a time."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._workers: dict[str, Any] = {}
        if NOSET_VARIABLE in os.environ and ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))

    def __repr__(self) -> str:
        return self._label  # the prefix of this process's lines in the driver's output

    def build(self, roles: Mapping[str, RayClassWithInitArgs]) -> None:
        for role, worker in roles.items():
            self._workers[role] = worker.cls(*worker.args, **worker.kwargs)
        for built in self._workers.values():
            built.attach(self._workers, RayObjectStore())

    def call(self, role: str, method: str, call: Call) -> Any:
        return getattr(self._workers[role], method)(*call.args, **call.kwargs)


class RoleWorkerGroup(WorkerGroup):
    """One role's methods on the processes of a ``RayWorkerGroup``."""

    def __init__(self, owner: "RayWorkerGroup", role: str, worker_class: type) -> None:
        super().__init__(worker_class, owner.world_size)
        self._owner = owner
        self._role = role

    def _start(self, method: str, calls: Sequence[Call]) -> list[Any]:
        return self._owner.start_calls(self._role, method, calls)

    def _finish(self, method: str, running: list[Any]) -> Results:
        return self._owner.finish_calls(f"{self._role}.{method}", running)


class RayWorkerGroup(WorkerGroup):
    """One process per place of the pool, each holding the given class or classes.

    Returns while the processes still start; the first call waits for them and reports what went wrong. With
    co-located classes the group itself offers what every ``Worker`` has, and ``spawn`` the roles.
    """

    def __init__(
        self,
        resource_pool: RayResourcePool,
        ray_cls_with_init: RayClassWithInitArgs | dict[str, RayClassWithInitArgs],
        name_prefix: str = "",
        worker_env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            name_prefix: name of the processes in messages and logs; default: the class or the roles.
            worker_env: further environment of every rank.
        """
        worker_class: type = Worker
        if isinstance(ray_cls_with_init, RayClassWithInitArgs):
            worker_class = ray_cls_with_init.cls
            roles = {name_prefix or worker_class.__name__: ray_cls_with_init}
        else:
            roles = ray_cls_with_init
        super().__init__(worker_class, resource_pool.world_size)
        self._roles = roles
        self._main_role = next(iter(roles))
        places = resource_pool.reserve()
        label = name_prefix or "+".join(roles)
        self._hosts = [
            _start_host(f"{label} rank {rank}", place, environment, resource_pool)
            for rank, (place, environment) in enumerate(
                zip(places, _environments(places, worker_env or {}), strict=True)
            )
        ]
        self._ranks = Ranks("+".join(roles), self._hosts, [place.node_ip for place in places])
        self.watch: Callable[[], None] = lambda: None
        """Called now and then while a call runs; what it raises ends the wait."""
        shared_roles = ray.put(roles)
        self._building: list[Any] | None = [host.build.remote(shared_roles) for host in self._hosts]

    def spawn(self, prefix_set: set[str]) -> dict[str, RoleWorkerGroup]:
        """A view per role, which shares this group's processes."""
        unknown = sorted(prefix_set - self._roles.keys())
        if unknown:
            raise ValueError(f"no roles {unknown} in this group; it holds {sorted(self._roles)}")
        return {role: RoleWorkerGroup(self, role, self._roles[role].cls) for role in self._roles if role in prefix_set}

    def start_calls(self, role: str, method: str, calls: Sequence[Call]) -> list[Any]:
        """Begin ``calls[i]`` on rank i; arguments that go to several ranks are stored once.

        Raises:
            WorkerError: neither memory nor disk has space for the arguments.
        """
        self._wait_built()
        first, payloads = calls[0], list[Any](calls)
        hosts = self._hosts[: len(calls)]
        try:
            if len(calls) > 1 and (first.args or first.kwargs) and all(call is first for call in calls):
                payloads = [ray.put(first)] * len(calls)
            return [host.call.remote(role, method, payload) for host, payload in zip(hosts, payloads, strict=True)]
        except (OutOfDiskError, ObjectStoreFullError) as error:
            raise WorkerError(f"{role}.{method} could not be given its data: {disk_full_text()}") from error

    def finish_calls(self, call_name: str, running: Sequence[Any]) -> Results:
        """Ranks and results of ``start_calls`` as they come; raises ``WorkerError``."""
        return self._ranks.results(running, call_name, self.watch)

    def check_alive(self) -> None:
        """Raise ``WorkerError`` where a rank's process has died; returns at once."""
        self._ranks.check_alive()

    def _wait_built(self) -> None:
        if self._building is not None:
            by_rank(self.finish_calls(f"{self._ranks.name}.__init__", self._building))
            self._building = None

    def shutdown(self) -> None:
        """End the processes; their places stay the pool's. A second call does nothing."""
        if ray.is_initialized():
            for host in self._hosts:
                ray.kill(host, no_restart=True)

    def _start(self, method: str, calls: Sequence[Call]) -> list[Any]:
        return self.start_calls(self._main_role, method, calls)

    def _finish(self, method: str, running: list[Any]) -> Results:
        return self.finish_calls(f"{self._main_role}.{method}", running)


def _start_host(label: str, place: RankPlace, environment: dict[str, str], pool: RayResourcePool) -> Any:
    share = {kind: amount / pool.max_colocate_count for kind, amount in pool.rank_share.items()}
    host_class: Any = ray.remote(WorkerHost)
    return host_class.options(
        num_cpus=share["CPU"],
        num_gpus=share.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            place.group, placement_group_bundle_index=place.bundle_index
        ),
        runtime_env={"env_vars": environment},
    ).remote(label)


def _environments(places: Sequence[RankPlace], worker_env: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank: its place, quiet libraries, its share of the node's threads, the user's own."""
    ranks_on_node = Counter(place.node_id for place in places)
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 1.0) for node in ray.nodes()}
    job_env = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    seen: Counter[str] = Counter()
    environments = []
    for rank, place in enumerate(places):
        threads = max(1, int(cpus[place.node_id] // ranks_on_node[place.node_id]))
        defaults = {**QUIET_ENV, "OMP_NUM_THREADS": str(threads)}
        inherited = {name: os.environ.get(name, value) for name, value in defaults.items()}
        rank_env = {
            "RANK": rank,
            "WORLD_SIZE": len(places),
            "LOCAL_RANK": seen[place.node_id],
            "LOCAL_WORLD_SIZE": ranks_on_node[place.node_id],
            "VERL_NODE_ID": place.node_id,
            "VERL_NODE_IP": place.node_ip,
        }
        environments.append({**inherited, **job_env, **worker_env, **{k: str(v) for k, v in rank_env.items()}})
        seen[place.node_id] += 1
    first = places[0]
    address = LOOPBACK if len(ranks_on_node) == 1 else first.node_ip
    master = {"MASTER_ADDR": address, "MASTER_PORT": str(_free_port_on(first.node_id))}
    return [{**environment, **master} for environment in environments]


def _free_port_on(node_id: str) -> int:
    if node_id == ray.get_runtime_context().get_node_id():
        return find_free_port()
    task: Any = ray.remote(num_cpus=0)(find_free_port)
    return ray.get(task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote())


def find_free_port() -> int:
    """A port of this machine that nothing listens on.

    Below the range that outgoing connections draw from (32768 on Linux): Ray opens many of those before rank 0 listens.
    """
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("100 ports tried between 20000 and 32000 are all in use on this machine")

"""Worker groups on Ray.

    driver                                   rank r (one Ray actor, one process)
    RayWorkerGroup ── WorkerHost.call ─────► {"actor": StudentWorker, "ref": TeacherWorker}
      spawn() ──► a view per role

Each rank's process is a ``WorkerHost``. It holds one instance per role, so that co-located roles share the process,
its device and its process group. A rank's place (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``,
``MASTER_ADDR``) is in its environment before anything is imported, ``MASTER_PORT`` before a role is built. Dead ranks
are reported, never restarted.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.base.decorator import Call, Results, WorkerGroup
from verl.single_controller.base.worker import LOOPBACK, Worker, find_free_port
from verl.single_controller.ray.calls import RankResults, Remote, failure_of_ranks, sending
from verl.single_controller.ray.resource_pool import RankPlace, RayResourcePool


class RayClassWithInitArgs:
    """A worker class (plain or wrapped by ``ray.remote``) and the arguments each rank builds it with."""

    def __init__(self, cls: Any, *args: Any, **kwargs: Any) -> None:
        # What ray.remote returns is no class; the user's own lies below its metadata.
        metadata = getattr(cls, "__ray_metadata__", None)
        self.cls: type = metadata.modified_class.__ray_actor_class__ if metadata else cls
        self.args = args
        self.kwargs = kwargs


def create_colocated_worker_cls(class_dict: Mapping[str, RayClassWithInitArgs]) -> dict[str, RayClassWithInitArgs]:
    """Put one instance of each role, built in this order, into every rank's process."""
    return dict(class_dict)


class WorkerHost:
    """The actor: builds the roles of one rank and runs their methods, one at a time."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._workers: dict[str, Any] = {}
        if "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in os.environ and ray.get_gpu_ids():
            # Ray then shows every GPU of the node to every actor.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))

    def __repr__(self) -> str:
        return self._label  # the prefix of this process's lines in the driver's output

    def find_free_port(self) -> int:
        """See `worker.find_free_port`; of this rank's machine."""
        return find_free_port()

    def build(self, roles: Mapping[str, RayClassWithInitArgs], master_port: int) -> None:
        os.environ["MASTER_PORT"] = str(master_port)
        for role, worker in roles.items():
            self._workers[role] = worker.cls(*worker.args, **worker.kwargs)
        for built in self._workers.values():
            # Ray's own store: it counts references, and a value stays on its node until it is fetched.
            built.attach(self._workers, ray)

    def check_alive(self) -> None:
        """Answers once the calls before it are done."""

    def call(self, role: str, method: str, call: Call) -> Any:
        return getattr(self._workers[role], method)(*call.args, **call.kwargs)


class RoleWorkerGroup(WorkerGroup):
    """One role's methods on the processes of a ``RayWorkerGroup``."""

    def __init__(self, owner: "RayWorkerGroup", role: str, worker_class: type) -> None:
        super().__init__(worker_class, owner.world_size, owner.ranks_per_share)
        self._owner, self._role = owner, role

    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        return self._owner.results(self._role, method, calls)


class RayWorkerGroup(RoleWorkerGroup):
    """One process per place of the pool, each holding the given class or classes.

    Returns while the processes still start; the first call waits for them and reports what went wrong. With
    co-located classes the group itself offers what every ``Worker`` has, and ``spawn`` the roles.
    """

    def __init__(
        self,
        resource_pool: RayResourcePool,
        ray_cls_with_init: RayClassWithInitArgs | dict[str, RayClassWithInitArgs],
        name_prefix: str = "",
        ranks_per_share: int = 1,
    ) -> None:
        """
        Args:
            name_prefix: name of the processes in messages and logs; default: the class or the roles.
            ranks_per_share: consecutive ranks that get the same rows; of equal results the first is taken.
        """
        self.world_size, self.ranks_per_share = resource_pool.world_size, ranks_per_share
        if isinstance(ray_cls_with_init, RayClassWithInitArgs):
            worker_class = ray_cls_with_init.cls
            self._roles = {name_prefix or worker_class.__name__: ray_cls_with_init}
        else:
            worker_class, self._roles = Worker, ray_cls_with_init
        super().__init__(self, next(iter(self._roles)), worker_class)
        self._name = "+".join(self._roles)
        self.watch: Callable[[], None] = lambda: None
        """Called now and then while a call runs; what it raises ends the wait."""
        places = resource_pool.reserve()
        share = {kind: amount / resource_pool.max_colocate_count for kind, amount in resource_pool.rank_share.items()}
        host_class: Any = ray.remote(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))(WorkerHost)
        # Stored once; as a plain argument it would be pickled again for every rank.
        shared_roles = ray.put(self._roles)
        self._ranks: list[Remote] = []
        for place, environment in zip(places, _environments(places), strict=True):
            in_bundle = PlacementGroupSchedulingStrategy(place.group, place.bundle_index)
            options = {"scheduling_strategy": in_bundle, "runtime_env": {"env_vars": environment}}
            label = f"{name_prefix or self._name} rank {environment['RANK']}"
            rank = Remote(label, host_class.options(**options).remote(label), place.node_ip)
            rank.ask_for_log()
            self._ranks.append(rank)
        # A reference, which Ray resolves before build runs: the driver does not wait for rank 0.
        port = self._ranks[0].actor.find_free_port.remote()
        self._building = [rank.actor.build.remote(shared_roles, port) for rank in self._ranks]

    def spawn(self, prefix_set: set[str]) -> dict[str, RoleWorkerGroup]:
        """A view per role, which shares this group's processes."""
        return {role: RoleWorkerGroup(self, role, self._roles[role].cls) for role in self._roles if role in prefix_set}

    def results(self, role: str, method: str, calls: Sequence[Call]) -> Results:
        """Run ``calls[i]`` on rank i: ranks and results as they come. Arguments for several ranks are stored once.

        Raises:
            WorkerError: a rank failed, or neither memory nor disk has space for the arguments.
        """
        if self._building:
            list(RankResults(self._ranks, self._building, f"{self._name}.__init__", self.watch))
            self._building = []
        repeats, distinct = Counter(map(id, calls)), {id(call): call for call in calls if call.args or call.kwargs}
        with sending(f"{role}.{method}"):
            stored = {key: ray.put(call) for key, call in distinct.items() if repeats[key] > 1}
            payloads = [stored.get(id(call), call) for call in calls]
            # There are fewer calls than ranks where rank 0 alone is called.
            to_ranks = zip(self._ranks, payloads, strict=False)
            running = [rank.actor.call.remote(role, method, payload) for rank, payload in to_ranks]
        return RankResults(self._ranks, running, f"{role}.{method}", self.watch)

    def check_alive(self) -> None:
        """Raise ``WorkerError`` where a rank's process has died; returns at once."""
        for rank, remote in enumerate(self._ranks):
            if (error := remote.find_death()) is not None:
                raise failure_of_ranks(self._ranks, [(rank, error)], self._name) from error

    def shutdown(self) -> None:
        """End the processes; their places stay the pool's. A second call does nothing."""
        # ray.kill would start a Ray of its own where none is running (AUTO_INIT_APIS).
        if ray.is_initialized():
            for rank in self._ranks:
                ray.kill(rank.actor)


def _environments(places: Sequence[RankPlace]) -> list[dict[str, str]]:
    """The environment of each rank: its place, and its share of the node's threads where the user has set none."""
    ranks_on_node = Counter(place.node_id for place in places)
    cpus = {node["NodeID"]: node["Resources"].get("CPU", 1.0) for node in ray.nodes()}
    job_env = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    environments = []
    for rank, place in enumerate(places):
        on_node = ranks_on_node[place.node_id]
        threads = os.environ.get("OMP_NUM_THREADS", max(1, int(cpus[place.node_id] // on_node)))
        rank_env = {
            # An actor's environment goes over the job's, which would hide what the user set there.
            "OMP_NUM_THREADS": job_env.get("OMP_NUM_THREADS", threads),
            "RANK": rank,
            "WORLD_SIZE": len(places),
            "LOCAL_RANK": sum(other.node_id == place.node_id for other in places[:rank]),
            "LOCAL_WORLD_SIZE": on_node,
            "VERL_NODE_ID": place.node_id,
            "VERL_NODE_IP": place.node_ip,
            "MASTER_ADDR": LOOPBACK if len(ranks_on_node) == 1 else places[0].node_ip,
        }
        environments.append({name: str(value) for name, value in rank_env.items()})
    return environments

"""Worker groups on a local Ray cluster of two CPUs: places, data, co-located roles, and how failures read."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.cloudpickle import register_pickle_by_value

from verl.protocol import DataProto
from verl.single_controller.base import Worker, WorkerError
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.base.worker import LOOPBACK
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

register_pickle_by_value(sys.modules[__name__])  # ranks do not import test modules


class Student(Worker):
    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        if offset < 0:
            raise ValueError(f"cannot build with offset {offset}")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def join(self) -> int:
        self.init_process_group("gloo", timeout_s=60)
        total = torch.tensor(self.rank + 1)
        dist.all_reduce(total)
        return int(total)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        data.batch["x"].add_(self.offset)  # what arrives is the worker's own, so writing to it is allowed
        return DataProto.from_dict({"old_log_probs": data.batch["x"]}, {"rank": [self.rank] * len(data)})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def raise_on(self, rank: int) -> int:
        if self.rank == rank:
            raise ValueError("the numbers do not add up\nsecond line")
        return self.rank

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def die_in_collective(self, rank: int) -> None:
        self.init_process_group("gloo", timeout_s=60)
        if self.rank == rank:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def take_long(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.rank

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def environment(self, names: list[str]) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def process(self) -> tuple[int, bool]:
        return os.getpid(), dist.is_initialized()


@pytest.fixture(scope="module")
def pool() -> Iterator[RayResourcePool]:
    runtime_env = {"env_vars": {"OMP_NUM_THREADS": "3"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    yield RayResourcePool([2], use_gpu=False)
    ray.shutdown()


@pytest.fixture(scope="module")
def colocated(pool: RayResourcePool) -> RayWorkerGroup:
    """Two processes, which take most of the time of these tests to start; the last test kills one."""
    classes = {"actor": RayClassWithInitArgs(Student, 3), "ref": RayClassWithInitArgs(ray.remote(Student), 0)}
    return RayWorkerGroup(pool, classes)


@pytest.fixture
def actor(colocated: RayWorkerGroup) -> Any:
    return colocated.spawn({"actor"})["actor"]


def test_places(colocated, actor):
    (node,) = ray.nodes()
    place = {"node_id": node["NodeID"], "node_ip": node["NodeManagerAddress"], "cuda_visible_devices": None}
    assert colocated.get_placement() == [place | {"rank": rank, "local_rank": rank} for rank in (0, 1)]
    assert colocated.world_size == actor.world_size == 2
    assert actor.environment(["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"])[1] == ["1", "2", "2", LOOPBACK]
    assert actor.environment(["OMP_NUM_THREADS"]) == [["3"], ["3"]], "the user's choice, not a share of the CPUs"


def test_rows_travel_and_come_back(actor):
    data = DataProto.from_dict({"x": torch.arange(5)}, {"uid": list("abcde")})
    result = actor.compute_log_prob(data)
    assert result.batch["old_log_probs"].tolist() == [3, 4, 5, 6, 7]
    assert result.non_tensor_batch["rank"].tolist() == [0, 0, 0, 1, 1]
    assert data.batch["x"].tolist() == [0, 1, 2, 3, 4]
    large = DataProto.from_dict({"x": torch.ones(4, 250_000)})
    assert actor.compute_log_prob(large).batch["old_log_probs"].unique().tolist() == [4.0], "writable there"


def test_roles_share_processes_and_process_group(colocated):
    roles = colocated.spawn({"actor", "ref"})
    assert roles["actor"].join() == [3, 3]
    assert roles["actor"].process() == roles["ref"].process()


def test_an_exception_names_role_method_rank_node_and_cause(actor):
    with pytest.raises(WorkerError) as caught:
        actor.raise_on(1)
    lines = str(caught.value).splitlines()
    node = ray.nodes()[0]["NodeManagerAddress"]
    assert lines[0] == f"actor.raise_on failed on rank 1 of 2, node {node}: ValueError: the numbers do not add up"
    assert "raise ValueError" in str(caught.value)
    assert caught.value.by_user, "the same again would end the same"
    begun = actor.begin("raise_on", 1)
    with pytest.raises(WorkerError, match=r"^actor\.raise_on failed on rank 1 of 2"):
        while begun.check() is None:
            time.sleep(0.05)
    assert actor.raise_on(-1) == [0, 1]


def test_a_process_that_dies_elsewhere_ends_a_call(colocated, actor):
    def engine_died() -> None:
        raise RuntimeError("engine 0 died")

    colocated.watch = engine_died
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="engine 0 died"):
        actor.take_long(2.0)
    assert time.monotonic() - started < 1.9
    colocated.watch = lambda: None
    colocated.check_alive()  # a busy rank is asked, and alive
    assert actor.take_long(0.0) == [0, 1]


def test_a_killed_rank_is_reported_before_those_that_waited_for_it(pool, colocated, actor):
    """The last test of the group; another one in its places, which cannot be built, is reported by the first call."""
    with pytest.raises(WorkerError) as caught:
        actor.die_in_collective(1)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("actor.die_in_collective failed on rank 1 of 2, node ")
    assert "the process died: Worker unexpectedly exits" in lines[0]
    log = re.match(r"log: (/\S+\.err) on node ", lines[1])
    assert log and Path(log.group(1)).is_file()
    assert lines[2].startswith("rank 0, node ")
    with pytest.raises(WorkerError, match=r"^actor\+ref failed on rank 1 of 2, node \S+: the process died: "):
        for _ in range(100):
            colocated.check_alive()
            time.sleep(0.1)
    colocated.shutdown()
    colocated.shutdown()
    group = RayWorkerGroup(pool, RayClassWithInitArgs(Student, -1), name_prefix="student")
    with pytest.raises(WorkerError, match=r"student.__init__ failed on rank \d of 2, .*: ValueError: cannot build"):
        group.join()

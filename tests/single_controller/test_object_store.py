"""A batch larger than Ray's object store: it goes by way of the disk, and where that is full too the run says so."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
import torch
from ray.cloudpickle import register_pickle_by_value

from verl.protocol import DataProto
from verl.single_controller.base import Worker, WorkerError
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

register_pickle_by_value(sys.modules[__name__])  # ranks do not import test modules
pytestmark = pytest.mark.slow

STORE_BYTES = 80 * 2**20
COLUMNS = 6_000_000
"""Numbers of a row: two rows of eight bytes each are more than the store holds."""


class Student(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def double(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"y": data.batch["x"] * 2})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def total(self, data: DataProto) -> int:
        return int(data.batch["x"].sum())

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def widen(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"y": data.batch["x"].expand(len(data), COLUMNS).clone()})


@contextmanager
def group(**options: Any) -> Iterator[RayWorkerGroup]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=STORE_BYTES, **options)
    try:
        yield RayWorkerGroup(RayResourcePool([2], use_gpu=False), RayClassWithInitArgs(Student), name_prefix="actor")
    finally:
        ray.shutdown()


def rows(columns: int) -> DataProto:
    return DataProto.from_dict({"x": torch.ones(4, columns, dtype=torch.int64)})


def test_what_does_not_fit_into_memory_goes_by_way_of_the_disk() -> None:
    with group() as actor:
        assert int(actor.double(rows(COLUMNS)).batch["y"].sum()) == 2 * 4 * COLUMNS
        assert actor.total(rows(COLUMNS)) == [4 * COLUMNS] * 2
        assert int(actor.widen(rows(1)).batch["y"].sum()) == 4 * COLUMNS


def test_a_full_disk_is_named_with_what_to_do() -> None:
    """The disk counts as full from a hundredth of it on."""
    with group(_system_config={"local_fs_capacity_threshold": 0.01}) as actor:
        for method in (actor.double, actor.total):
            with pytest.raises(WorkerError, match=r"^actor\.\w+ could not be given its data: no space: .*_temp_dir"):
                method(rows(COLUMNS))
        with pytest.raises(WorkerError, match=r"^actor.widen failed on rank \d of 2, node \S+: no space: .*_temp_dir"):
            actor.widen(rows(1))

"""A batch larger than Ray's object store and the disk that it spills to: the run says so."""

import sys

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
COLUMNS = 6_000_000
"""Numbers of a row: two rows of eight bytes each are more than the store holds."""


class Student(Worker):
    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def widen(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"y": data.batch["x"].expand(len(data), COLUMNS).clone()})


def test_a_full_disk_is_named_with_what_to_do() -> None:
    """The disk counts as full from a hundredth of it on."""
    full = {"local_fs_capacity_threshold": 0.01}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _system_config=full)
    try:
        actor = RayWorkerGroup(RayResourcePool([2], use_gpu=False), RayClassWithInitArgs(Student), name_prefix="actor")
        with pytest.raises(WorkerError, match=r"^actor.widen could not be given its data: no space: .*_temp_dir"):
            actor.widen(DataProto.from_dict({"x": torch.ones(4, COLUMNS, dtype=torch.int64)}))
        with pytest.raises(WorkerError, match=r"^actor.widen failed on rank \d of 2, node \S+: no space: .*_temp_dir"):
            actor.widen(DataProto.from_dict({"x": torch.ones(4, 1, dtype=torch.int64)}))
    finally:
        ray.shutdown()

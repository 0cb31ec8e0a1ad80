"""Groups of one rank in this process are called as any group is."""

import pytest
import torch

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, Execute, register
from verl.trainer.ppo.worker_groups import LocalWorkerGroup, WorkerGroups


class Doubler(Worker):
    """Doubles, and knows who else is there."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=("x",))
    def double(self, data: DataProto) -> DataProto:
        assert set(data.batch.keys()) == {"x"}, "no other key travels"
        return DataProto.from_dict({"doubled": 2 * data.tensor("x")})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def roles(self) -> list[str]:
        return sorted(self.colocated_roles)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def refuse(self, number: int) -> int:
        raise ValueError(f"not {number}")

    def unregistered(self) -> None: ...


@pytest.fixture
def group() -> LocalWorkerGroup:
    return WorkerGroups(PPOConfig(), ["a", "b"], "cpu").start_in_process(dict.fromkeys("ab", Doubler), lambda _: {})[
        "a"
    ]


def test_calls_are_those_of_a_group_of_one_rank(group: LocalWorkerGroup) -> None:
    batch = DataProto.from_dict({"x": torch.tensor([1.0, 2.0, 3.0]), "y": torch.zeros(3)})
    assert group.double(batch).tensor("doubled").tolist() == [2.0, 4.0, 6.0]
    assert group.world_size == 1
    assert group.roles() == [["a", "b"]]
    assert [place["rank"] for place in group.get_placement()] == [0]


def test_errors_are_the_workers_own(group: LocalWorkerGroup) -> None:
    with pytest.raises(ValueError, match="not 3"):
        group.refuse(3)
    with pytest.raises(AttributeError, match="no registered method 'unregistered'"):
        group.unregistered()

"""How registered methods are split over ranks and joined again, on a group that runs its ranks in this process."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from verl.protocol import DataProto, pad_dataproto_to_divisor
from verl.single_controller.base import WorkerGroup
from verl.single_controller.base.decorator import (
    Call,
    Dispatch,
    Execute,
    Results,
    RowBuffer,
    register,
    registered_methods,
)


class LocalGroup(WorkerGroup):
    """Ranks one after the other; remembers what each was called with."""

    def __init__(self, workers: Sequence[Any], ranks_per_share: int = 1) -> None:
        super().__init__(type(workers[0]), len(workers), ranks_per_share)
        self.workers = workers
        self.calls: list[Call] = []

    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        self.calls = list(calls)
        results = [
            (rank, getattr(self.workers[rank], method)(*call.args, **call.kwargs)) for rank, call in enumerate(calls)
        ]
        return reversed(results)  # in another order than they were called


def test_any_method_can_be_begun() -> None:
    group = LocalGroup([Arithmetic(0), Arithmetic(1)])
    rows = DataProto.from_dict({"x": torch.arange(3)})
    doubled = group.begin("double", rows, scale=3)
    assert group.calls[1].kwargs == {"scale": 3}, "before it is waited for"
    assert group.begin("later", 5)() == group.later(5)() == [5, 6]
    assert doubled().batch["doubled"].tolist() == [0, 3, 6]


class Arithmetic:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def add_rank(self, value: int, scale: int = 1) -> int:
        return scale * (value + self.rank)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def only_zero(self, value: int) -> int:
        return value + self.rank

    @register(blocking=False)
    def later(self, value: int) -> int:
        return value + self.rank

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def double(self, data: DataProto, other: DataProto | None = None, *, scale: int = 2) -> DataProto:
        assert other is None or len(other) == len(data)
        rows = {"doubled": scale * data.batch["x"]}
        return DataProto.from_dict(
            rows, {"rank": [self.rank] * len(data)}, {"metrics": {"rows": len(data), "of": self.rank}}
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, padding=False)
    def update(self, data: DataProto) -> DataProto:
        return DataProto(meta_info={"metrics": {"sum": int(data.batch["x"].sum())}})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def count(self, data: DataProto) -> int:
        return len(data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def one_row(self, data: DataProto) -> DataProto:
        return data[:1]

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=("x", "absent"))
    def square(self, data: DataProto) -> DataProto:
        return DataProto.from_dict({"squared": data.batch["x"] ** 2})


def make_group(ranks: int = 2) -> LocalGroup:
    return LocalGroup([Arithmetic(rank) for rank in range(ranks)])


def rows(count: int) -> DataProto:
    return DataProto.from_dict({"x": torch.arange(count)}, {"uid": [f"u{row}" for row in range(count)]})


def test_rank_zero_alone_and_one_to_all():
    assert make_group().only_zero(5) == 5
    assert make_group(3).add_rank(5, scale=2) == [10, 12, 14]
    assert make_group(3).later(5)() == [5, 6, 7]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_rows_are_split_as_if_padded_and_come_back_in_order_without_padding(ranks, count):
    group = make_group(ranks)
    result = group.double(rows(count))
    assert result.batch["doubled"].tolist() == [2 * row for row in range(count)]
    share = -(-count // ranks)
    assert result.non_tensor_batch["rank"].tolist() == [row // share for row in range(count)]
    assert result.meta_info["metrics"] == {"rows": [share] * ranks, "of": [*range(ranks)]}
    chunks = pad_dataproto_to_divisor(rows(count), ranks)[0].chunk(ranks)
    assert [call.args[0].batch["x"].tolist() for call in group.calls] == [c.batch["x"].tolist() for c in chunks]
    assert [list(call.args[0].array("uid")) for call in group.calls] == [list(c.array("uid")) for c in chunks]


@pytest.mark.parametrize("count", [4, 5])
def test_ranks_that_share_rows_get_the_same_ones_and_the_first_of_them_answers(count):
    group = LocalGroup([Arithmetic(rank) for rank in range(6)], ranks_per_share=3)
    result, share = group.double(rows(count)), -(-count // 2)
    assert result.batch["doubled"].tolist() == [2 * row for row in range(count)]
    assert result.non_tensor_batch["rank"].tolist() == [3 * (row // share) for row in range(count)]
    assert result.meta_info["metrics"] == {"rows": [share] * 2, "of": [0, 3]}
    assert [call is group.calls[rank // 3 * 3] for rank, call in enumerate(group.calls)] == [True] * 6
    assert group.count(rows(count)) == [share] * 2 and group.add_rank(5) == [5, 6, 7, 8, 9, 10]
    assert group.update(rows(4)).meta_info["metrics"] == {"sum": [1, 5]}
    with pytest.raises(ValueError, match=r"update got 3 rows for 2 groups of 3 ranks; use a .* multiple of 2"):
        group.update(rows(3))


def test_only_what_a_method_reads_travels():
    group, data = make_group(), rows(3)
    data.batch["y"], data.meta_info["step"] = torch.zeros(3), 7
    assert group.square(data).batch["squared"].tolist() == [0, 1, 4]
    for sent in (call.args[0] for call in group.calls):
        assert set(sent.batch.keys()) == {"x"} and not sent.non_tensor_batch and sent.meta_info == {"step": 7}
    assert set(data.batch.keys()) == {"x", "y"}, "the driver's batch keeps everything"
    assert group.calls[0].args[0].batch["x"].data_ptr() == data.batch["x"].data_ptr(), "rows are views"


def test_several_batches_are_split_alike_and_other_arguments_pass():
    assert make_group().double(rows(4), other=rows(4), scale=3).batch["doubled"].tolist() == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="double got batches of 2 and 4 rows"):
        make_group().double(rows(4), rows(2))


def test_no_repeated_row_where_it_would_count_twice():
    assert make_group().update(rows(4)).meta_info["metrics"] == {"sum": [1, 5]}
    with pytest.raises(ValueError, match="update got 5 rows for 2 ranks"):
        make_group().update(rows(5))


def test_results_without_rows_and_of_other_types():
    assert make_group().count(rows(5)) == [3, 3]
    with pytest.raises(ValueError, match=r"one_row must return 3 rows on every rank.* ranks \[0, 1\] did not"):
        make_group().one_row(rows(5))


def test_a_batch_without_rows_reaches_every_rank():
    group = make_group()
    assert group.count(DataProto(meta_info={"step": 1})) == [0, 0]
    assert [call.args[0].meta_info for call in group.calls] == [{"step": 1}] * 2


def test_an_override_keeps_its_registration():
    class Other(Arithmetic):
        def add_rank(self, value: int, scale: int = 1) -> int:
            return -value

    assert registered_methods(Other)["add_rank"].dispatch_mode is Dispatch.ONE_TO_ALL
    assert LocalGroup([Other(0), Other(1)]).add_rank(5) == [-5, -5]


def test_parts_are_let_go_of_as_they_are_joined_and_missing_rows_and_columns_are_named():
    buffer, part = RowBuffer(4), rows(2)
    held = weakref.ref(part.batch["x"])
    buffer.put(0, part)
    del part
    gc.collect()
    assert held() is None
    with pytest.raises(ValueError, match="2 of 4 rows have come"):
        buffer.take()
    with pytest.raises(ValueError, match="not in all: uid"):
        buffer.put(2, DataProto.from_dict({"x": torch.arange(2)}))

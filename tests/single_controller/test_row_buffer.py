"""Runs of rows in their places: any order, one copy."""

import gc
import weakref

import pytest
import torch

from verl.protocol import DataProto
from verl.single_controller.base.decorator import RowBuffer


def run(first: int, count: int, **meta_info: object) -> DataProto:
    ids = torch.arange(first, first + count)
    return DataProto.from_dict({"x": ids, "wide": ids[:, None].expand(-1, 3).float()}, {"uid": ids.tolist()}, meta_info)


def test_runs_in_any_order_are_what_concat_makes() -> None:
    parts = [run(0, 2, metrics={"loss": 1.0}, step=3), run(2, 1, metrics={"loss": 2.0}, step=3), run(3, 2, step=3)]
    buffer = RowBuffer(5)
    for start, part in ((3, parts[2]), (0, parts[0]), (2, parts[1])):
        buffer.put(start, part)
    joined, right = buffer.take(), DataProto.concat(parts)
    assert all(torch.equal(joined.batch[key], right.batch[key]) for key in ("x", "wide"))
    assert joined.array("uid").tolist() == [0, 1, 2, 3, 4]
    assert joined.meta_info == right.meta_info == {"step": 3, "metrics": {"loss": [1.0, 2.0]}}


def test_repeated_rows_behind_the_end_are_left_out_and_their_figures_stay() -> None:
    buffer = RowBuffer(3)
    for rank in range(3):
        buffer.put(2 * rank, run(2 * rank, 2, metrics={"rank": rank}))
    joined = buffer.take()
    assert joined.batch["x"].tolist() == [0, 1, 2]
    assert joined.meta_info["metrics"] == {"rank": [0, 1, 2]}


def test_a_run_can_be_let_go_of_at_once() -> None:
    buffer, part = RowBuffer(4), run(0, 2)
    held = weakref.ref(part.batch["x"])
    buffer.put(0, part)
    assert held() is not None
    del part
    gc.collect()
    assert held() is None


def test_missing_rows_and_columns_are_named() -> None:
    buffer = RowBuffer(4)
    buffer.put(0, run(0, 2))
    with pytest.raises(ValueError, match="2 of 4 rows have come"):
        buffer.take()
    with pytest.raises(ValueError, match=r"not in all: uid, wide"):
        buffer.put(2, DataProto.from_dict({"x": torch.arange(2)}))

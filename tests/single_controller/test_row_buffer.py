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

"""Parts of a batch in their places: any order, one copy."""

import weakref

import pytest
import torch

from verl.protocol import DataProto
from verl.utils.row_buffer import RowBuffer


def part_of(first: int, count: int, **meta_info: object) -> DataProto:
    ids = torch.arange(first, first + count)
    return DataProto.from_dict({"x": ids, "wide": ids[:, None].expand(-1, 3).float()}, {"uid": ids.tolist()}, meta_info)


def test_parts_in_any_order_give_what_concat_gives_without_the_rows_past_the_end() -> None:
    parts = [part_of(0, 2, metrics={"loss": 1.0}, step=3), part_of(2, 1, metrics={"loss": 2.0}), part_of(3, 2, step=3)]
    buffer = RowBuffer(4)
    for number in (2, 0, 1):
        buffer.put((0, 2, 3)[number], parts[number])
    joined, right = buffer.take(), DataProto.concat(parts)
    assert all(torch.equal(joined.batch[key], right.batch[key][:4]) for key in ("x", "wide"))
    assert joined.array("uid").tolist() == [0, 1, 2, 3]
    assert joined.meta_info == right.meta_info == {"step": 3, "metrics": {"loss": [1.0, 2.0]}}


def test_a_part_can_be_freed_at_once() -> None:
    buffer, part = RowBuffer(4), part_of(0, 2)
    tensor = weakref.ref(part.batch["x"])
    buffer.put(0, part)
    del part
    assert tensor() is None


def test_missing_rows_and_columns_are_named() -> None:
    buffer = RowBuffer(4)
    buffer.put(0, part_of(0, 2))
    with pytest.raises(ValueError, match="2 of 4 rows have come"):
        buffer.take()
    with pytest.raises(ValueError, match=r"not in all: uid, wide"):
        buffer.put(2, DataProto.from_dict({"x": torch.arange(2)}))

"""Partitions, row orders and micro-batches on small lists, with the sums written out."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.tiny_workers import run_ranks
from tensordict import TensorDict

from verl.single_controller.base import Worker
from verl.utils.seqlen_balancing import balanced_order, get_seqlen_balanced_partitions, rearrange_micro_batches


def sums(seqlens: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(seqlens[row] for row in part) for part in parts]


def rows_of(*lengths: int, width: int = 16) -> TensorDict:
    """Rows with so many attended tokens, and their number."""
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return TensorDict({"attention_mask": mask, "row": torch.arange(len(lengths))}, batch_size=len(lengths))


# ---------------------------------------------------------------- partitions


def test_karmarkar_karp_by_hand() -> None:
    # The textbook case 8 7 6 5 4: differences 8-7=1, 6-5=1, then 4-1=3, then 3-1=2: parts of 16 and 14.
    seqlens = [8, 7, 6, 5, 4]
    parts = get_seqlen_balanced_partitions(seqlens, 2, equal_size=False)
    assert sums(seqlens, parts) == [16, 14]
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3, 4]


def test_partitions_hold_every_row_once_and_none_is_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = int(torch.randint(1, 24, (1,), generator=generator))
        parts_wanted = int(torch.randint(1, rows + 1, (1,), generator=generator))
        seqlens = torch.randint(0, 30, (rows,), generator=generator).tolist()
        parts = get_seqlen_balanced_partitions(seqlens, parts_wanted, equal_size=False)
        assert len(parts) == parts_wanted
        assert all(part and part == sorted(part) for part in parts)
        assert sorted(row for part in parts for row in part) == list(range(rows))
        assert sums(seqlens, parts) == sorted(sums(seqlens, parts), reverse=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_equal_size_partitions_are_equal_and_balanced(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    seqlens = torch.randint(1, 1000, (24,), generator=generator).tolist()
    parts = get_seqlen_balanced_partitions(seqlens, ranks, equal_size=True)
    assert [len(part) for part in parts] == [24 // ranks] * ranks
    tokens = sums(seqlens, parts)
    assert max(tokens) - min(tokens) < max(seqlens) / 2
    with pytest.raises(ValueError, match=f"25 rows do not divide into {ranks + 25} parts"):
        get_seqlen_balanced_partitions([*seqlens, 1], ranks + 25, equal_size=True)


# ---------------------------------------------------------------- order over ranks


def test_balanced_order_by_hand() -> None:
    # Mini-batch 0 is rows 0-3 (10 1 1 10): the ranks get 11 tokens each. Mini-batch 1 is rows 4-7 (5 5 9 1): 10 each.
    seqlens = [10, 1, 1, 10, 5, 5, 9, 1]
    order = balanced_order(seqlens, mini_batch_rows=4, dp_size=2)
    first, second = order[:4], order[4:]
    for share in (first, second):
        assert sum(seqlens[row] for row in share[:2]) == 11
        assert sum(seqlens[row] for row in share[2:]) == 10
    assert sorted(first[:2] + second[:2]) == [0, 1, 2, 3]
    assert sorted(first[2:] + second[2:]) == [4, 5, 6, 7]
    # Two mini-batches of which one pair has 11 and the other 4: each rank gets the fuller pair of one.
    seqlens = [9, 2, 2, 2] * 2
    order = balanced_order(seqlens, mini_batch_rows=4, dp_size=2)
    assert [sum(seqlens[row] for row in share) for share in (order[:4], order[4:])] == [15, 15]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("mini_batch_rows", [12, 24, 48])
def test_mini_batches_hold_the_same_rows_for_any_number_of_ranks(dp_size: int, mini_batch_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    seqlens = torch.randint(1, 500, (48,), generator=generator).tolist()
    order = balanced_order(seqlens, mini_batch_rows, dp_size)
    assert sorted(order) == list(range(48)) and (dp_size > 1 or order == list(range(48)))
    share, local = 48 // dp_size, mini_batch_rows // dp_size
    for number in range(48 // mini_batch_rows):
        slices = [order[rank * share + number * local :][:local] for rank in range(dp_size)]
        together = sorted(row for rows in slices for row in rows)
        assert together == list(range(number * mini_batch_rows, (number + 1) * mini_batch_rows))


# ---------------------------------------------------------------- micro-batches


def test_micro_batches_hold_every_row_once_within_the_limit_fullest_first() -> None:
    seqlens = [3, 9, 4, 1, 6, 8, 2]
    micro_batches, parts = rearrange_micro_batches(rows_of(*seqlens), max_token_len=11)
    tokens = sums(seqlens, parts)
    assert tokens == [11, 11, 11]  # 33 tokens need three of 11, and there is a perfect cut
    assert [part["row"].tolist() for part in micro_batches] == parts
    assert [int(part["attention_mask"].sum()) for part in micro_batches] == tokens
    # 18 tokens would fit two micro-batches of 10 by their sum, but no two rows of 6 fit one.
    assert sorted(rearrange_micro_batches(rows_of(6, 6, 6), max_token_len=10)[1]) == [[0], [1], [2]]
    assert len(rearrange_micro_batches(rows_of(1, 1, 1, 1), max_token_len=16, min_num_micro_batch=3)[1]) == 3


def test_a_row_above_the_limit_is_named() -> None:
    with pytest.raises(ValueError, match="12 tokens, a micro-batch holds 11; raise"):
        rearrange_micro_batches(rows_of(3, 12), max_token_len=11)


def count_micro_batches(lengths: list[list[int]], folder: Path) -> None:
    """On each rank: micro-batches with and without the other rank, and the tokens of the fullest."""
    Worker().init_process_group("gloo")
    rank = dist.get_rank()
    _, parts = rearrange_micro_batches(rows_of(*lengths[rank]), max_token_len=10)
    _, alone = rearrange_micro_batches(rows_of(*lengths[rank]), max_token_len=10, same_micro_num_in_dp=False)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths[rank])))
    seen = [len(parts), len(alone), max(sums(lengths[rank], parts))]
    (folder / f"seen_{rank}").write_text(str(seen))


def test_ranks_agree_on_the_number_of_micro_batches(tmp_path: Path) -> None:
    # Rank 0 has 8 tokens and would take one micro-batch, rank 1 needs four of one row each.
    run_ranks(2, count_micro_batches, [[2, 2, 2, 2], [9, 9, 9, 9]], tmp_path)
    assert [(tmp_path / f"seen_{rank}").read_text() for rank in range(2)] == ["[4, 1, 2]", "[4, 4, 9]"]

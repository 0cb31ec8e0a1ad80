"""Partitions, row orders and micro-batches on small lists, with the sums written out."""

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict

from verl.utils import seqlen_balancing


def sums(seqlens: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(seqlens[row] for row in part) for part in parts]


def rows_of(*lengths: int, width: int = 16) -> TensorDict:
    """Rows with so many attended tokens, and their number."""
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return TensorDict({"attention_mask": mask, "row": torch.arange(len(lengths))}, batch_size=len(lengths))


@pytest.mark.parametrize(
    ("seqlens", "equal_size", "expected"),
    [
        # The textbook case: differences 8-7=1, 6-5=1, then 4-1=3, then 3-1=2: parts of 16 and 14.
        ([8, 7, 6, 5, 4], False, [16, 14]),
        # Neighbours 9 8 | 5 4 | 3 1 differ by 1, 1, 2: (3) against (9|8) leaves 1, (5|4) against that leaves 0.
        ([9, 8, 5, 4, 3, 1], True, [15, 15]),
    ],
)
def test_karmarkar_karp_by_hand(seqlens: list[int], equal_size: bool, expected: list[int]) -> None:
    assert sums(seqlens, seqlen_balancing.get_seqlen_balanced_partitions(seqlens, 2, equal_size)) == expected


@pytest.mark.parametrize("equal_size", [True, False])
def test_partitions_contain_every_row_once_and_are_balanced(equal_size: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for wanted in (1, 2, 3, 8, 24):
        seqlens = torch.randint(0, 1000, (24,), generator=generator).tolist()
        parts = seqlen_balancing.get_seqlen_balanced_partitions(seqlens, wanted, equal_size)
        assert len(parts) == wanted and all(part and part == sorted(part) for part in parts)
        assert sorted(row for part in parts for row in part) == list(range(24))
        assert not equal_size or {len(part) for part in parts} == {24 // wanted}
        assert max(sums(seqlens, parts)) - min(sums(seqlens, parts)) <= max(seqlens) / (1 if wanted == 24 else 2)


def test_unbalance_metrics() -> None:
    # In order of arrival 9 + 8 and 1 + 2; balanced 9 + 1 and 8 + 2.
    by_hand = {"min": 3, "max": 17, "minmax_diff": 14, "balanced_min": 10, "balanced_max": 10, "mean": 10}
    metrics = seqlen_balancing.log_seqlen_unbalance([9, 8, 1, 2], [[0, 2], [1, 3]], "global_seqlen")
    assert metrics == {f"global_seqlen/{name}": value for name, value in by_hand.items()}


def test_balanced_order_by_hand() -> None:
    # Mini-batch 0 is rows 0-3 (10 1 1 10): the ranks get 11 tokens each. Mini-batch 1 is rows 4-7 (5 5 9 1): 10 each.
    seqlens = [10, 1, 1, 10, 5, 5, 9, 1]
    order = seqlen_balancing.balanced_order(seqlens, mini_batch_rows=4, dp_size=2)
    assert sums(seqlens, [order[:2], order[2:4], order[4:6], order[6:]]) == [11, 10, 11, 10]
    assert sorted(order[:2] + order[4:6]) == [0, 1, 2, 3]
    # The fuller part goes to the rank with fewer tokens: 9 and 1, then 1 and 9.
    assert seqlen_balancing.balanced_order([9, 1, 9, 1], mini_batch_rows=2, dp_size=2) == [0, 3, 1, 2]


@pytest.mark.parametrize("dp_size", [1, 3, 4])
@pytest.mark.parametrize("mini_batch_rows", [12, 48])
def test_mini_batches_contain_the_same_rows_for_any_number_of_ranks(dp_size: int, mini_batch_rows: int) -> None:
    seqlens = torch.randint(1, 500, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    order = seqlen_balancing.balanced_order(seqlens, mini_batch_rows, dp_size)
    assert order[seqlen_balancing.get_reverse_idx(order)[5]] == 5 and (dp_size > 1 or order == list(range(48)))
    share, local = 48 // dp_size, mini_batch_rows // dp_size
    for number in range(48 // mini_batch_rows):
        slices = [order[rank * share + number * local :][:local] for rank in range(dp_size)]
        together = sorted(row for rows in slices for row in rows)
        assert together == list(range(number * mini_batch_rows, (number + 1) * mini_batch_rows))


def test_micro_batches_contain_every_row_once_within_the_limit_fullest_first() -> None:
    seqlens = [3, 9, 4, 1, 6, 8, 2]
    micro_batches, parts = seqlen_balancing.rearrange_micro_batches(rows_of(*seqlens), max_token_len=11)
    assert sums(seqlens, parts) == [11, 11, 11]  # 33 tokens need three of 11, and there is a perfect cut
    assert [part["row"].tolist() for part in micro_batches] == parts
    assert [int(part["attention_mask"].sum()) for part in micro_batches] == [11, 11, 11]
    rows = torch.cat([part["row"] for part in micro_batches])
    assert seqlen_balancing.restore_dynamic_batch(rows, parts).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_as_many_micro_batches_as_the_limit_and_the_caller_require() -> None:
    # 18 tokens would fit two micro-batches of 10 by their sum, but no two rows of 6 fit one.
    _, parts = seqlen_balancing.rearrange_micro_batches(rows_of(6, 6, 6), max_token_len=10)
    assert sorted(parts) == [[0], [1], [2]]
    _, parts = seqlen_balancing.rearrange_micro_batches(rows_of(1, 1, 1, 1), max_token_len=16, min_num_micro_batch=3)
    assert len(parts) == 3


def test_rows_that_do_not_divide_or_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows cannot fill 4 parts"):
        seqlen_balancing.get_seqlen_balanced_partitions([1] * 3, 4, False)
    with pytest.raises(ValueError, match="5 rows do not divide"):
        seqlen_balancing.get_seqlen_balanced_partitions([1] * 5, 2, True)
    with pytest.raises(ValueError, match="6 rows does not divide into mini-batches of 4"):
        seqlen_balancing.balanced_order([1] * 6, 4, 2)
    with pytest.raises(ValueError, match=r"row 1 has 12 tokens and a micro-batch holds 11; raise"):
        seqlen_balancing.rearrange_micro_batches(rows_of(3, 12), max_token_len=11)


@pytest.mark.parametrize(("lengths", "alone"), [([2, 2, 2, 2], 1), ([9, 9, 9, 9], 4)])
def test_ranks_agree_on_the_number_of_micro_batches(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], alone: int
) -> None:
    # One rank has 8 tokens and would take one micro-batch, the other needs four of one row each.
    def most_of_two(count: torch.Tensor, op: object, group: object = None) -> None:
        assert op == dist.ReduceOp.MAX and int(count) == alone
        count.fill_(4)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", most_of_two)
    _, parts = seqlen_balancing.rearrange_micro_batches(rows_of(*lengths), max_token_len=10)
    assert sorted(parts) == [[0], [1], [2], [3]]
    _, parts = seqlen_balancing.rearrange_micro_batches(rows_of(*lengths), max_token_len=10, same_micro_num_in_dp=False)
    assert len(parts) == alone

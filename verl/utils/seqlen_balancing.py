"""Sharing sequences out so that every part holds about as many tokens.

In:  sequence lengths, or a batch with an ``attention_mask``. Out: index lists, or the batch cut into micro-batches.
`balanced_order` lays the rows of a step out over ranks (driver); `rearrange_micro_batches` cuts one rank's rows into
micro-batches (worker). Not here: padding, packing, and which rows form a mini-batch.

Letters: B sequences, T tokens of a padded row.
"""

import heapq
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from tensordict import TensorDict

Part = tuple[int, list[int]]
"""Tokens of a part, and its rows."""


def get_seqlen_balanced_partitions(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Divide rows into parts of about equal numbers of tokens (Karmarkar-Karp, the largest differencing method).

    It starts from one division into k parts per row or, for parts of equal size, per k rows next to each other in
    length, and merges divisions, those with the largest spread first.

    Args:
        seqlen_list: (B,) tokens of each row.
        k_partitions: number of parts.
        equal_size: every part gets B / k rows.

    Returns:
        k lists of row numbers, none empty, each ascending, the fullest part first; the same for the same lengths.

    Raises:
        ValueError: fewer rows than parts, or rows that do not divide into parts of equal size.
    """
    if not 1 <= k_partitions <= len(seqlen_list) or (equal_size and len(seqlen_list) % k_partitions):
        raise ValueError(f"{len(seqlen_list)} rows do not divide into {k_partitions} parts, equal_size={equal_size}")
    order = sorted(range(len(seqlen_list)), key=lambda row: (-seqlen_list[row], row))
    rows_each = k_partitions if equal_size else 1
    heap: list[tuple[int, int, list[Part]]] = []
    for start in range(0, len(order), rows_each):
        division: list[Part] = [(int(seqlen_list[row]), [row]) for row in order[start : start + rows_each]]
        division += [(0, [])] * (k_partitions - len(division))
        # The start breaks ties: the order is the same on every rank, and lists are never compared.
        heapq.heappush(heap, (division[-1][0] - division[0][0], start, division))
    while len(heap) > 1:
        _, ticket, first = heapq.heappop(heap)
        # The fullest part of one takes the emptiest of the other. Sorted by rows too: with rows of no tokens an empty
        # part must still count as emptier, or one could stay empty.
        pairs = zip(first, reversed(heapq.heappop(heap)[2]), strict=True)
        merged = [(tokens + other, rows + more) for (tokens, rows), (other, more) in pairs]
        merged.sort(key=lambda part: (part[0], len(part[1])), reverse=True)
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], ticket, merged))
    return [sorted(rows) for _, rows in heap[0][2]]


def balanced_order(seqlens: Sequence[int], mini_batch_rows: int, dp_size: int) -> list[int]:
    """Row order in which contiguous shares of a batch, one a rank, hold balanced shares of every mini-batch.

    Global mini-batch k is rows ``[k * mini_batch_rows, (k + 1) * mini_batch_rows)`` as they come, whatever
    ``dp_size``. After reordering, rank r's share (rows ``[r * B / dp_size, (r + 1) * B / dp_size)``) is, mini-batch by
    mini-batch, an equal number of rows of each. Within a mini-batch the ranks get about equal tokens, and the fullest
    part goes to the rank that has the fewest so far.

    Args:
        seqlens: (B,) tokens of each row.
        mini_batch_rows: rows of one optimizer step over all ranks.
        dp_size: ranks.

    Returns:
        (B,) a permutation; the identity for one rank.

    Raises:
        ValueError: a mini-batch does not divide over the ranks.
    """
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    tokens = [0] * dp_size
    for start in range(0, len(seqlens), mini_batch_rows):
        lengths = seqlens[start : start + mini_batch_rows]
        parts = get_seqlen_balanced_partitions(lengths, dp_size, equal_size=True)
        fewest_first = sorted(range(dp_size), key=lambda rank: (tokens[rank], rank))
        for rank, part in zip(fewest_first, parts, strict=True):
            shares[rank] += [start + row for row in part]
            tokens[rank] += sum(lengths[row] for row in part)
    return list(chain.from_iterable(shares))


def _fewest_parts(seqlens: list[int], max_token_len: int, at_least: int) -> list[list[int]]:
    """Balanced parts of at most ``max_token_len`` tokens, as few as the method finds from ``at_least`` on."""
    start = min(max(at_least, -(-sum(seqlens) // max_token_len)), len(seqlens))
    for k_partitions in range(start, len(seqlens)):
        parts = get_seqlen_balanced_partitions(seqlens, k_partitions, equal_size=False)
        if max(sum(seqlens[row] for row in part) for part in parts) <= max_token_len:
            return parts
    return [[row] for row in sorted(range(len(seqlens)), key=lambda row: -seqlens[row])]


def most_over_ranks(number: int, device: torch.device | str = "cpu", dp_group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number, device=device)
    # A collective: every rank has to get here, and equally often.
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=dp_group)
    return int(value.item())


def rearrange_micro_batches(
    batch: TensorDict,
    max_token_len: int,
    dp_group: dist.ProcessGroup | None = None,
    same_micro_num_in_dp: bool = True,
    min_num_micro_batch: int | None = None,
) -> tuple[list[TensorDict], list[list[int]]]:
    """Cut one rank's rows into micro-batches of about equal tokens, none above ``max_token_len``.

    Every rank gets the same NUMBER of micro-batches (that of the rank that needs most), because sharded training
    communicates in each of them. The fullest comes first on every rank: they wait for each other least, and memory
    runs out at once or not at all.

    Args:
        batch: (B, ...) with ``attention_mask`` (B, T), whose sum is a row's length.
        max_token_len: most tokens of one micro-batch, padding not counted.
        dp_group: ranks that must agree; None: all. The batch lies on a device that the group communicates from.
        same_micro_num_in_dp: False: do not ask the other ranks.
        min_num_micro_batch: at least so many micro-batches.

    Returns:
        the micro-batches, and the rows of each.

    Raises:
        ValueError: a row is longer than ``max_token_len``, or more micro-batches are needed than there are rows.
    """
    seqlens = [int(length) for length in batch["attention_mask"].sum(dim=1).tolist()]
    if (longest := max(seqlens)) > max_token_len:
        raise ValueError(
            f"a row has {longest} tokens, a micro-batch holds {max_token_len}; raise *_max_token_len_per_gpu"
        )
    wanted, at_least = min_num_micro_batch or 1, 0
    while wanted != at_least:  # a rank that gets more parts than it needs may then need more still
        if wanted > len(seqlens):
            raise ValueError(f"a rank needs {wanted} micro-batches and this one has {len(seqlens)} rows")
        at_least = wanted
        parts = _fewest_parts(seqlens, max_token_len, at_least)
        if same_micro_num_in_dp:
            # The same number on every rank, so all of them leave the loop together.
            wanted = most_over_ranks(len(parts), batch["attention_mask"].device, dp_group)
    return [batch[torch.tensor(part, device=batch.device)] for part in parts], parts

"""Ulysses sequence parallelism: the ranks of a group hold the same packed rows, and each computes a part of the tokens.

A decoder works token by token but for its attention, which looks at whole rows. So around it tokens and heads change
places: before, a rank has all heads of its tokens, within, all tokens of its heads (arXiv:2309.14509)::

    rank 0  tokens 0..n  heads 0..H  ──►  tokens 0..2n  heads 0..H/2  ──►  attention  ──►  as before
    rank 1  tokens n..2n heads 0..H  ──►  tokens 0..2n  heads H/2..H  ──►  attention  ──►

In:  tensors of which each rank has a part. Out: other parts of them; gradients go back the way that values came. Every
rank of a group makes each call. Not here: which tokens and which scored positions are whose (``token_stats_model``).

Letters: H query heads, G key heads, n tokens of a rank, N of all ranks, d size of a head.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class SequenceGroup(NamedTuple):
    """Ranks that compute the same rows together; by default one rank, by itself."""

    rank: int = 0
    """This rank's place in the group."""
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of_size(cls, size: int) -> "SequenceGroup":
        """This rank's group of ``size`` consecutive ranks; all ranks call it together."""
        if size == 1:
            return cls()
        process_group, _ = dist.new_subgroups(size)
        return cls(dist.get_rank(process_group), size, process_group)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Add the tensors of all ranks, in place: whole ones where each rank has zeros but for its own part."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)

    def exchange(self, tensor: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Send each rank a run of rows, and get one from each.

        Args:
            tensor: (sum of send, ...), the rows for rank 0 first.
            send: rows for each rank.
            receive: rows from each rank.

        Returns:
            (sum of receive, ...), the rows from rank 0 first.
        """
        received: torch.Tensor = _Exchange.apply(tensor, list(send), list(receive), self.process_group)
        return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.way_back = receive, send, group
        received = tensor.new_empty(sum(receive), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Exchange.apply(gradients[0], *ctx.way_back), None, None, None


Attention = Callable[..., tuple[torch.Tensor, None]]
"""From a layer, queries (1, H, N, d), keys and values (1, G, N, d), a mask and options to (1, N, H, d)."""


def over_heads(attention: Attention) -> Attention:
    """Attention that takes this rank's n tokens of a ``sequence_group``, and gives theirs; without one as it is.

    Where there are fewer key heads than ranks, each is copied to several of them.
    """

    @wraps(attention)
    def of_tokens(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        sequence_group: SequenceGroup | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if sequence_group is None:
            return attention(module, query, key, value, attention_mask, *args, **options)
        size, copies = sequence_group.size, max(1, sequence_group.size // key.shape[1])

        def change_places(tensor: torch.Tensor) -> torch.Tensor:
            """(1, H, n, d) to (1, H / ranks, N, d), and (1, N, H / ranks, d) to (1, n, H, d)."""
            each = [tensor.shape[1] // size] * size
            parts = sequence_group.exchange(tensor[0], each, each)  # by the rank that they come from
            return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)[None]

        if copies > 1:
            key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
        tensors = map(change_places, (query, key, value))
        output, _ = attention(module, *tensors, attention_mask, *args, **options)
        return change_places(output), None

    return of_tokens

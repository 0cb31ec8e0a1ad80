"""The rows of extended ids in embedding and lm head: how far they have moved, and holding them where they are.

In:  a sharded student as its files have it, and the first extended id. Out: relative changes since then, and, where the
rows are frozen, steps that leave them bit-identical. The parameters are sharded over rows, so the extended rows of a
rank begin anywhere in its share, or it has none of them::

    rank 0  [ shared                ]
    rank 1  [ shared      | extended ]     first = 12 of 23 rows
    rank 2  [ extended    ]                first = 0

Embedding and head count together, as one matrix where they are tied. Not here: the optimizer, clipping, whole files
(``recipe.onpolicy_distill.restore_extended_rows``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from verl.workers.fsdp.token_stats_model import TokenStatsModel

ROWS_AT_ONCE = 8192
"""Rows compared at a time: they come to the device from host memory, and differences take memory."""


class _Matrix(NamedTuple):
    """This rank's share of a matrix with a row per id."""

    parameter: DTensor
    first: int
    """Place in the share of the first extended row; its length where there is none."""
    start: torch.Tensor
    """The share as the run started, in host memory."""

    @property
    def rows(self) -> torch.Tensor:
        """The share as it is now; the same memory."""
        # Asked for each time: offload puts the share into other memory.
        return self.parameter.to_local().detach()

    def squares(self, begin: int, end: int) -> torch.Tensor:
        """(2,) float64: sums of the squares of what rows ``begin`` to ``end`` moved by, and of their start."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.rows.device)
        parts = (rows[begin:end].split(ROWS_AT_ONCE) for rows in (self.rows, self.start))
        for now, start in zip(*parts, strict=True):
            before = start.to(now.device).float()
            moved = now.float() - before
            sums += torch.stack([part.square().sum(dtype=torch.float64) for part in (moved, before)])
        return sums


class ExtendedRows:
    """Extended rows of a student. Build it before anything trains or loads a checkpoint: what it finds is the start.

    Keeps a copy of embedding and head in host memory: 1.4 GB for 176,384 rows of 2,048 in fp32, over all ranks.

    Args:
        module: the sharded student.
        extend_start: first extended id.
        frozen: whether optimizer steps leave the extended rows as they are.
        only_extended: whether they leave the shared ones as they are.

    Raises:
        ValueError: the model has no row of an extended id.
    """

    def __init__(self, module: TokenStatsModel, extend_start: int, frozen: bool, only_extended: bool) -> None:
        ends = (module.causal_lm.get_input_embeddings(), module.causal_lm.get_output_embeddings())
        # One where they are tied; none where an adapter alone is trained.
        weights = dict.fromkeys(end.weight for end in ends if end.weight.requires_grad)
        self._matrices = [_find_share(weight, extend_start) for weight in weights]
        kept = [slice(m.first, None) if frozen else slice(m.first if only_extended else 0) for m in self._matrices]
        self._kept = list(zip(self._matrices, kept, strict=True))
        """Which rows steps leave as they are."""

    def drop_gradient(self) -> None:
        """Set the gradient of rows that are frozen to zero; before clipping, so that it is not in the norm."""
        for matrix, kept in self._kept:
            if isinstance(matrix.parameter.grad, DTensor):
                matrix.parameter.grad.to_local()[kept].zero_()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put rows that are frozen back after an optimizer step.

        A zero gradient is not enough: weight decay moves rows of its own accord.
        """
        held = [matrix.rows[kept] for matrix, kept in self._kept]
        before = [rows.clone() for rows in held]
        yield
        for rows, values in zip(held, before, strict=True):
            rows.copy_(values)

    def drift(self) -> dict[str, float]:
        """``||rows - rows at the start|| / ||rows at the start||`` of extended and of shared rows, over all ranks."""
        if not self._matrices:
            return {"actor/extended_row_drift": 0.0, "actor/shared_row_drift": 0.0}
        # (2, 2) of each matrix: of extended and of shared rows, the squares of their moves and of their start.
        parts = [torch.stack([m.squares(m.first, len(m.start)), m.squares(0, m.first)]) for m in self._matrices]
        sums = torch.stack(parts).sum(0)
        dist.all_reduce(sums)  # squares add up over ranks, norms do not
        ratios = [math.sqrt(moved / start) if start else 0.0 for moved, start in sums.tolist()]
        return {"actor/extended_row_drift": ratios[0], "actor/shared_row_drift": ratios[1]}


def _find_share(parameter: nn.Parameter, extend_start: int) -> _Matrix:
    assert isinstance(parameter, DTensor) and parameter.placements[-1] == Shard(0), "student models are sharded by rows"
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    if not 0 < extend_start < rows:
        raise ValueError(f"extend_vocab_start_token={extend_start} leaves no extended row: the model has {rows} rows")
    # FSDP cuts rows as `torch.chunk` does: equal shares, of which the last ranks may have less or nothing.
    own, rows_each = parameter.to_local().detach(), -(-rows // mesh.size(mesh.ndim - 1))
    first = min(max(extend_start - mesh.get_local_rank(mesh.ndim - 1) * rows_each, 0), len(own))
    return _Matrix(parameter, first, own.to("cpu", copy=True))

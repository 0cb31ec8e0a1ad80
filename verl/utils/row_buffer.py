"""Rows that arrive in runs, in any order, joined without a second copy of them.

In: runs of rows as ``DataProto``, each with the place of its first row. Out: one ``DataProto``. The whole is allocated
when the first run shows its columns; a run is copied into its place, and whoever brought it can let go of it. Joining
all runs at the end instead would hold every row twice, and where runs are small, what they leave in the heap stays.
"""

from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto, merge_meta_info


class RowBuffer:
    """Room for a number of rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._filled = 0
        self._tensors: dict[str, torch.Tensor] | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._meta_info: dict[int, dict[str, Any]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no run has come yet."""
        return self._tensors is None

    def put(self, start: int, run: DataProto) -> None:
        """Copy a run to rows ``start`` and on; what would lie past the last row is left out.

        Raises:
            ValueError: its columns, or their shapes, are not those of the first run.
        """
        tensors = {} if run.batch is None else dict(run.batch.items())
        if self._tensors is None:
            self._tensors = {key: _room(self._rows, value) for key, value in tensors.items()}
            self._arrays = {key: np.empty(self._rows, dtype=object) for key in run.non_tensor_batch}
        odd = (tensors.keys() | run.non_tensor_batch.keys()) ^ (self._tensors.keys() | self._arrays.keys())
        if odd:
            raise ValueError(f"rows can only be joined with the same keys; not in all: {', '.join(sorted(odd))}")
        count = max(0, min(len(run), self._rows - start))
        place = slice(start, start + count)
        for key, value in tensors.items():
            into = self._tensors[key]
            if value.shape[1:] != into.shape[1:] or value.dtype != into.dtype:
                raise ValueError(
                    f"{key!r} has rows of {tuple(value.shape[1:])} {value.dtype} in one part and of "
                    f"{tuple(into.shape[1:])} {into.dtype} in another"
                )
            into[place] = value[:count]
        for key, array in run.non_tensor_batch.items():
            self._arrays[key][place] = array[:count]
        self._meta_info[start] = run.meta_info
        self._filled += count

    def take(self) -> DataProto:
        """All rows; facts are joined as ``DataProto.concat`` does.

        Raises:
            ValueError: rows are missing, or facts contradict each other.
        """
        if self._filled != self._rows:
            raise ValueError(f"{self._filled} of {self._rows} rows have come")
        meta_info = merge_meta_info([self._meta_info[start] for start in sorted(self._meta_info)])
        return DataProto.from_dict(self._tensors, self._arrays, meta_info)


def _room(rows: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty((rows, *like.shape[1:]), dtype=like.dtype)

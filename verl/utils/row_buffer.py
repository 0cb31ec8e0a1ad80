"""Rows that come in parts, in any order, joined without a second copy of them.

In: parts of a batch as ``DataProto``, each with the number of its first row. Out: one ``DataProto``. The whole is
allocated when the first part shows its columns; each part is copied into place, and its sender can free it. Joining all
parts at the end instead would hold every row twice, and the memory of many small parts would not go back to the system.
"""

from typing import Any

import numpy as np

from verl.protocol import DataProto, merge_meta_info


class RowBuffer:
    """A batch of a known number of rows, filled part by part."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._filled = 0
        self._tensors: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._meta_info: dict[int, dict[str, Any]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no part has come yet."""
        return not self._meta_info

    def put(self, start: int, part: DataProto) -> None:
        """Copy ``part`` to rows ``start`` and on; rows past the last one are left out.

        Raises:
            ValueError: its columns are not those of the first part.
        """
        tensors = {} if part.batch is None else dict(part.batch.items())
        if self.is_empty:
            self._tensors = {key: value.new_empty((self._rows, *value.shape[1:])) for key, value in tensors.items()}
            self._arrays = {key: np.empty(self._rows, dtype=object) for key in part.non_tensor_batch}
        whole, columns = self._tensors | self._arrays, tensors | part.non_tensor_batch
        if differing := whole.keys() ^ columns.keys():
            raise ValueError(f"rows can only be joined with the same keys; not in all: {', '.join(sorted(differing))}")
        count = max(0, min(len(part), self._rows - start))
        for key, values in columns.items():
            whole[key][start : start + count] = values[:count]
        self._meta_info[start] = part.meta_info
        self._filled += count

    def take(self) -> DataProto:
        """All rows; ``meta_info`` is joined as ``DataProto.concat`` does.

        Raises:
            ValueError: rows are missing, or the parts' ``meta_info`` contradict each other.
        """
        if self._filled != self._rows:
            raise ValueError(f"{self._filled} of {self._rows} rows have come")
        meta_info = merge_meta_info([self._meta_info[start] for start in sorted(self._meta_info)])
        return DataProto.from_dict(self._tensors, self._arrays, meta_info)

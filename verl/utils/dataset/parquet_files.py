"""Rows of several parquet files as one sequence.

In: files, folders and globs. Out: rows as dictionaries, each with the file and the row number it came from. Files may
differ in their columns. What a row means is not known here.
"""

import glob
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]

ROWS_PER_READ = 1024
"""Rows turned into Python objects at a time while scanning."""


def expand_data_files(data_files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The parquet files that a path, a folder (its own files), a glob, or a list of these stands for.

    Files of a folder or glob come in the order of their names. Raises ValueError where one stands for nothing, as an
    empty text does.
    """
    entries = [data_files] if isinstance(data_files, str | Path) else list(data_files or [])
    if not entries:
        raise ValueError(f"no data file is given ({data_files!r}); name a parquet file, a folder or a glob")
    files: list[Path] = []
    for entry in entries:
        path = Path(entry).expanduser()
        if not str(entry):
            found = []  # as a path it would be the current folder
        elif path.is_dir():
            found = sorted(path.glob("*.parquet"))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not found:
            kind = (
                "the folder holds no *.parquet file"
                if str(entry) and path.is_dir()
                else "no such file, folder or match"
            )
            raise ValueError(f"data file {str(entry)!r}: {kind}")
        files.extend(found)
    return files


class ParquetRows:
    """All rows of ``files``, of which only ``columns`` are kept in memory."""

    def __init__(self, files: Sequence[Path], columns: Iterable[str]) -> None:
        self.files = list(files)
        wanted = set(columns)
        self._tables = [_read_table(path, wanted) for path in self.files]
        self._ends = list(accumulate(table.num_rows for table in self._tables))
        self.columns = {name for table in self._tables for name in table.column_names}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row ``index`` over all files."""
        number = bisect_right(self._ends, index)
        return self._tables[number].slice(self._row_in_file(index, number), 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Row]:
        """Every row in order, read a block at a time."""
        for table in self._tables:
            for batch in table.to_batches(max_chunksize=ROWS_PER_READ):
                yield from batch.to_pylist()

    def location(self, index: int) -> tuple[Path, int]:
        """The file of row ``index`` and its row number there, counted from 0."""
        number = bisect_right(self._ends, index)
        return self.files[number], self._row_in_file(index, number)

    def _row_in_file(self, index: int, number: int) -> int:
        return index - (self._ends[number - 1] if number else 0)


def column_names(files: Sequence[Path]) -> set[str]:
    """The columns that any of ``files`` has; reads their schemas alone."""
    names: set[str] = set()
    for path in files:
        with _open_parquet(path) as file:
            names.update(file.schema_arrow.names)
    return names


def _read_table(path: Path, wanted: set[str]) -> pa.Table:
    with _open_parquet(path) as file:
        return file.read(columns=[name for name in file.schema_arrow.names if name in wanted])


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # ParquetFile reads just this file; read_table would also make columns out of folder names such as `a=b`.
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read as a parquet file: {reason}") from error

"""Parquet files in, rows out, with a cache between runs.

In: files, folders and globs. Out: rows as dictionaries, each with the file and the row number it came from. Files may
differ in their columns and in the types of these. What a row means is decided elsewhere.

Parquet reads well only from front to back. So the wanted columns are copied once to an Arrow file in
``data.cache_dir``, and rows are read from its memory map: no more than a block of rows is in this process's own memory.
"""

import glob
import hashlib
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl.utils.broken_files import describe_damage

Row = dict[str, Any]
Files = str | Path | Sequence[str | Path]

ROWS_PER_BLOCK = 256
"""Rows copied and turned into Python objects at a time."""
READ_BUFFER_BYTES = 1 << 20
"""Buffer of a column that is read from parquet: without one a whole row group would be read."""
COPY_LAYOUT = 1
"""To be raised where the copies change, so that older ones are made anew."""


def expand_data_files(data_files: Files) -> list[Path]:
    """The parquet files that a path, a folder (its own files), a glob, or a list of these stands for.

    Files of a folder or glob come in the order of their names. Raises ValueError where one stands for nothing.
    """
    entries = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    files: list[Path] = []
    for entry in entries:
        # A text, not a Path: the empty text would become the current folder.
        pattern = os.path.expanduser(str(entry))
        if os.path.isfile(pattern):
            found = [pattern]  # before the glob: a file's own name may hold its characters
        else:
            inside = os.path.join(glob.escape(pattern), "*.parquet")
            found = sorted(glob.glob(inside if os.path.isdir(pattern) else pattern, recursive=True))
        if not found:
            raise ValueError(f"data file {str(entry)!r}: no such file, folder with *.parquet or match")
        files += map(Path, found)
    return files


def read_header(path: Path) -> tuple[list[str], int]:
    """Columns of a parquet file, and the number of its rows; reads no row.

    Raises ValueError, in one line, where it is not a parquet file, or a damaged one.
    """
    with _open_parquet(path) as file:
        return file.schema_arrow.names, file.metadata.num_rows


def column_names(files: Sequence[Path]) -> set[str]:
    """The columns that any of ``files`` has."""
    return {name for path in files for name in read_header(path)[0]}


def cached_file(
    cache_dir: str | Path, kind: str, suffix: str, write: Callable[[Path], None], **depends_on: Any
) -> Path:
    """The file that ``write(path)`` makes, made once for the values it depends on and found again by them.

    It is there whole or not at all, also where several processes make it at the same time. Nothing is ever deleted.

    Args:
        depends_on: everything that the content depends on, as JSON can hold it.

    Raises:
        ValueError: the folder cannot be written, or is full.
    """
    folder, key = Path(cache_dir).expanduser(), text_digest(json.dumps(depends_on, sort_keys=True))
    path = folder / f"{kind}-{key[:32]}{suffix}"
    if path.is_file():
        return path
    # A name of its own for each process: several may write at once, and the last to finish wins with the same content.
    beside = folder / f".{path.name}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir={folder} cannot be written: {error}; name another folder") from error
    return path


def text_digest(text: str) -> str:
    """Digest of a text, lone surrogates included."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest() -> str:
    """Digest of the source that reads and renders rows: results of other code are not read from the cache."""
    sources = [Path(__file__).parent.with_name("tokenizer.py"), *sorted(Path(__file__).parent.glob("*.py"))]
    return text_digest("".join(map(file_digest, sources)))


class ParquetRows:
    """All rows of ``files``, read with those of ``columns`` that each file has.

    Raises:
        ValueError: a file that cannot be read, files without a single row, or a cache that cannot be written.
    """

    def __init__(self, files: Sequence[Path], columns: Iterable[str], cache_dir: str | Path) -> None:
        self.files, wanted = list(files), set(columns)
        self.columns: set[str] = set()
        """Those of the wanted columns that any file has."""
        # By content: a file may change under the same size and time.
        self.digests = [file_digest(path) for path in self.files]
        """Of the content of each file."""
        self._copies: list[Path] = []
        self._tables: dict[int, pa.Table] = {}
        counts = []
        for path, digest in zip(self.files, self.digests, strict=True):
            # Copied with its own columns and types: files may differ in both, so no schema would do for all.
            names, count = read_header(path)
            there = [name for name in names if name in wanted]
            write = partial(_write_copy, path, there)
            copy = cached_file(cache_dir, "rows", ".arrow", write, file=digest, columns=there, layout=COPY_LAYOUT)
            self.columns.update(there)
            self._copies.append(copy)
            counts.append(count)
        self._starts = [0, *accumulate(counts)]
        if not len(self):
            raise ValueError(f"{', '.join(map(str, self.files))}: there is not a single row")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        """Row ``index`` over all files."""
        number, row = self._place(index)
        return self._read(number, row, 1)[0]

    def __iter__(self) -> Iterator[Row]:
        """Every row in order, read a block at a time."""
        for number, (start, end) in enumerate(pairwise(self._starts)):
            # Block by block: as Python objects, a whole file could be larger than memory.
            for row in range(0, end - start, ROWS_PER_BLOCK):
                yield from self._read(number, row, min(ROWS_PER_BLOCK, end - start - row))

    def location(self, index: int) -> tuple[Path, int]:
        """The file of row ``index`` and its row number there, counted from 0."""
        number, row = self._place(index)
        return self.files[number], row

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect_right(self._starts, index) - 1  # the last file that starts here: files before it may be empty
        return number, index - self._starts[number]

    def distinct(self, column: str, rows: np.ndarray | None = None) -> set[Any]:
        """Every value of a column in all rows or in these, None where it lacks; ValueError for lists and structs."""
        at, found = pa.array(np.isin(np.arange(len(self)), rows) if rows is not None else np.ones(len(self)) > 0), set()
        try:
            for number, (start, end) in enumerate(pairwise(self._starts)):
                has_it = column in (table := self._table(number)).column_names
                found |= {*table[column].filter(at[start:end]).unique().to_pylist()} if has_it else {None}
            return found
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"the column {column!r} must hold texts ({error}); name another") from error

    def _table(self, number: int) -> pa.Table:
        if number not in self._tables:
            # Of a memory map read_all copies nothing: pages are read when their rows are.
            self._tables[number] = pa.ipc.open_stream(pa.memory_map(str(self._copies[number]))).read_all()
        return self._tables[number]

    def _read(self, number: int, row: int, count: int) -> list[Row]:
        """Rows of a file's copy; a cell that Python cannot hold, such as broken UTF-8, costs no other."""
        block = self._table(number).slice(row, count)
        # Arrow takes four times as long where it looks for maps.
        maps = "lossy" if "map<" in str(block.schema) else None
        try:
            # Of a table without columns Arrow forgets how many rows there are.
            return block.to_pylist(maps_as_pydicts=maps) or [{}] * count
        except (ValueError, OverflowError):
            columns = [[_cell(scalar) for scalar in column] for column in block.columns]
            return [dict(zip(block.schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        # A loader process maps the files itself; pickled, the tables would travel whole.
        return self.__dict__ | {"_tables": {}}


def _write_copy(source: Path, columns: list[str], target: Path) -> None:
    with _open_parquet(source) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    # The stream format, not the file format: it allows every block a dictionary of its own.
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for block in _read_blocks(source, columns):
            writer.write_batch(block)


def _read_blocks(source: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Blocks of rows; a generator, so that what goes wrong with them elsewhere is not taken for an unreadable file."""
    with _open_parquet(source) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BLOCK, columns=columns)


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="lossy")
    except (ValueError, OverflowError) as error:
        return getattr(error, "object", str(error))  # of broken UTF-8 the bytes, which are found unreadable later


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # ParquetFile reads just this file; read_table would also make columns out of folder names such as `a=b`.
        with pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = describe_damage(path, error, "convert it, or copy it again")
        raise ValueError(f"{path} cannot be read as parquet: {reason}") from error

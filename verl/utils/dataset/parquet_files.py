"""Rows of several parquet files as one sequence.

In: files, folders and globs. Out: rows as dictionaries, each with the file and the row number it came from. Files may
differ in their columns and in the types of these. What a row means is not known here.

Parquet is compressed and can be read well only from front to back. So the columns in use are copied once to an Arrow
file in the cache, a block of rows at a time; single rows are then read from its memory map, scans from the file. Either
way no more than a block of rows is in this process's own memory, however many there are.
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

from verl.utils.dataset.data_cache import DEFAULT_CACHE_DIR, DataCache, file_digest

Row = dict[str, Any]

ROWS_PER_BLOCK = 256
"""Rows copied and turned into Python objects at a time."""
READ_BUFFER_BYTES = 1 << 20
"""Of a column that is read from parquet: without a buffer a whole row group would be."""
COPY_LAYOUT = 1
"""To be raised where the copies change, so that older ones are made anew."""
PARQUET_MAGIC = b"PAR1"
"""How a parquet file begins and ends."""
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")


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
    """All rows of ``files``, read with those of ``columns`` that each file has.

    Raises:
        ValueError: a file that cannot be read, files without a single row, or a cache that cannot be written.
    """

    def __init__(
        self, files: Sequence[Path], columns: Iterable[str], cache_dir: str | Path = DEFAULT_CACHE_DIR
    ) -> None:
        self.files = list(files)
        cache, wanted = DataCache(cache_dir), set(columns)
        copies = [_ArrowCopy(path, wanted, cache) for path in self.files]
        self.columns = {name for copy in copies for name in copy.columns}
        """Those of the columns asked for that any file has."""
        self.digests = [copy.digest for copy in copies]
        """Digest of each file's content."""
        self._copies = copies
        self._ends = list(accumulate(copy.num_rows for copy in copies))
        if not len(self):
            raise ValueError(f"{', '.join(map(str, self.files))}: there is not a single row")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row ``index`` over all files."""
        number = bisect_right(self._ends, index)
        return self._copies[number].row(index - self.start(number))

    def __iter__(self) -> Iterator[Row]:
        """Every row in order, read a block at a time."""
        for number in range(len(self.files)):
            yield from self.scan(number)

    def scan(self, number: int) -> Iterator[Row]:
        """The rows of file ``number`` in order."""
        return self._copies[number].scan()

    def start(self, number: int) -> int:
        """Index of the first row of file ``number``."""
        return self._ends[number - 1] if number else 0

    def count(self, number: int) -> int:
        """Rows of file ``number``."""
        return self._ends[number] - self.start(number)

    def location(self, index: int) -> tuple[Path, int]:
        """The file of row ``index`` and its row number there, counted from 0."""
        number = bisect_right(self._ends, index)
        return self.files[number], index - self.start(number)


def read_header(path: Path) -> tuple[list[str], int]:
    """Columns of a parquet file, and the number of its rows; reads no row.

    Raises ValueError, in one line, where it is no parquet file or a damaged one.
    """
    with _open_parquet(path) as file:
        return file.schema_arrow.names, file.metadata.num_rows


def column_names(files: Sequence[Path]) -> set[str]:
    """The columns that any of ``files`` has."""
    return {name for path in files for name in read_header(path)[0]}


class _ArrowCopy:
    """The columns in use of one parquet file, as an uncompressed Arrow file in the cache."""

    def __init__(self, source: Path, wanted: set[str], cache: DataCache) -> None:
        names, self.num_rows = read_header(source)
        self.columns = [name for name in names if name in wanted]
        self.digest = file_digest(source)
        self._path = cache.path("rows", ".arrow", file=self.digest, columns=self.columns, layout=COPY_LAYOUT)
        self._table: pa.Table | None = None
        if not self._path.is_file():
            with cache.writing(self._path) as path:
                _write_copy(source, self.columns, path)

    def row(self, number: int) -> Row:
        """One row, from the memory map."""
        if self._table is None:
            self._table = pa.ipc.open_stream(pa.memory_map(str(self._path))).read_all()
        return _python_rows(self._table.slice(number, 1))[0] if self.columns else {}

    def scan(self) -> Iterator[Row]:
        """All rows, a block at a time."""
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as blocks:
            for block in blocks:
                yield from _python_rows(block)

    def __getstate__(self) -> dict[str, Any]:
        # A loader process maps the file itself; pickled, the table would travel whole.
        return self.__dict__ | {"_table": None}


def _write_copy(source: Path, columns: list[str], target: Path) -> None:
    with _open_parquet(source) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    # The stream format, not the file format: it allows every block a dictionary of its own.
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for block in _read_blocks(source, columns):
            writer.write_batch(block)


def _read_blocks(source: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _open_parquet(source) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BLOCK, columns=columns)


def _python_rows(block: pa.RecordBatch | pa.Table) -> list[Row]:
    """Rows as dictionaries; a cell that Python cannot hold, such as text that is no UTF-8, does not cost the others."""
    try:
        return block.to_pylist()
    except (ValueError, OverflowError):
        columns = {name: [_cell(scalar) for scalar in block.column(name)] for name in block.schema.names}
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object  # the bytes, which whoever reads the row finds unreadable
    except (ValueError, OverflowError) as error:
        return str(error)


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # ParquetFile reads just this file; read_table would also make columns out of folder names such as `a=b`.
        with pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """One line that says what the file is instead, where its first and last bytes tell."""
    reason = str(error).strip().split("\n")[0]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(len(PARQUET_MAGIC))
            file.seek(max(size - len(PARQUET_MAGIC), 0))
            end = file.read()
    except OSError:
        return reason
    if size == 0:
        return "it is empty (0 bytes)"
    if begin == PARQUET_MAGIC and end != PARQUET_MAGIC:
        return f"its end is missing after {size:,} bytes; it was cut off, so copy or write it again"
    if begin != PARQUET_MAGIC and path.suffix.lower() in TEXT_SUFFIXES:
        return f"it is a {path.suffix[1:].upper()} file; convert it to parquet, such as with pandas' to_parquet"
    if begin != PARQUET_MAGIC:
        return f"it does not begin as one ({begin!r} instead of {PARQUET_MAGIC!r})"
    return f"it is damaged ({reason})"

"""Files, folders, globs, rows over files whose columns differ, and the cache of their copies."""

import pickle
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.utils.dataset.parquet_files import ParquetRows, cached_file, column_names, expand_data_files


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_files_folders_and_globs(tmp_path):
    first, second = write(tmp_path / "b.parquet", x=[1]), write(tmp_path / "a.parquet", x=[2])
    write(tmp_path / "deeper" / "c.parquet", x=[3])
    assert expand_data_files(str(first)) == [first]
    assert expand_data_files(tmp_path) == [second, first]  # by name, and not from folders below
    assert expand_data_files([first, str(tmp_path / "a*.parquet")]) == [first, second]
    assert len(expand_data_files(str(tmp_path / "**" / "*.parquet"))) == 3


def test_what_stands_for_no_file_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for missing in ("none.parquet", "*.parquet", "empty"):
        with pytest.raises(ValueError, match=rf"data file '.*{re.escape(missing)}'"):
            expand_data_files(str(tmp_path / missing))
    with pytest.raises(ValueError, match="data file ''"):
        expand_data_files([""])  # not the current folder


def test_rows_over_files_with_different_columns(tmp_path):
    files = [
        write(tmp_path / "a=1" / "one.parquet", x=["p", "q"], y=[1, 2], unused=[0, 0]),
        write(tmp_path / "two.parquet", x=pa.array(["r"]).dictionary_encode()),
        write(tmp_path / "none.parquet", x=pa.array([], pa.string())),
        write(tmp_path / "other.parquet", unused=[1, 2]),
        write(tmp_path / "three.parquet", x=pa.array(["s"], pa.large_string()), y=pa.nulls(1)),
    ]
    rows = ParquetRows(files, ["x", "y"], tmp_path / "cache")
    expected = [{"x": "p", "y": 1}, {"x": "q", "y": 2}, {"x": "r"}, {}, {}, {"x": "s", "y": None}]
    assert list(rows) == [rows[index] for index in range(6)] == expected
    assert (len(rows), rows.columns) == (6, {"x", "y"})
    places = [(files[0], 0), (files[0], 1), (files[1], 0), (files[3], 0), (files[3], 1), (files[4], 0)]
    assert [rows.location(index) for index in range(6)] == places
    assert column_names(files) == {"x", "y", "unused"}
    with pytest.raises(ValueError, match=r"none\.parquet: there is not a single row"):
        ParquetRows([files[2]], ["x"], tmp_path / "cache")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda whole: b"", "Parquet file size is 0 bytes"),
        (lambda whole: whole[:5000], "magic bytes not found"),
        (lambda whole: whole[:-300] + whole[-8:], ""),
    ],
)
def test_a_file_that_is_no_parquet_gives_one_clear_line(tmp_path, spoil, message):
    path = write(tmp_path / "d.parquet", x=[f"row {number} {number * 7919 % 1000}" for number in range(5000)])
    path.write_bytes(spoil(path.read_bytes()))
    expected = r"d\.parquet cannot be read as parquet: .*; convert it, or copy it again$"
    with pytest.raises(ValueError, match=expected) as caught:
        ParquetRows([path], ["x"], tmp_path / "cache")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_cell_that_python_cannot_hold_costs_no_other(tmp_path):
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfea")]
    text = pa.Array.from_buffers(pa.string(), 2, buffers)
    date = pa.array([0, 2**50], pa.timestamp("ms"))
    rows = ParquetRows([write(tmp_path / "d.parquet", x=text, y=date)], ["x", "y"], tmp_path / "cache")
    assert [row["x"] for row in rows] == [b"\xff\xfe", "a"]
    assert isinstance(rows[1]["y"], str)
    assert rows[0]["y"].year == 1970


def test_copies_are_made_once_and_for_the_content(tmp_path):
    cache = tmp_path / "cache"

    def rows_of(path, *columns):
        """Rows, and how many copies there are."""
        return list(ParquetRows([path], columns, cache)), len(list(cache.iterdir()))

    first = write(tmp_path / "a.parquet", x=["a"], y=[1])
    assert rows_of(first, "x") == ([{"x": "a"}], 1)
    assert rows_of(write(tmp_path / "elsewhere" / "b.parquet", x=["a"], y=[1]), "x") == ([{"x": "a"}], 1)
    assert rows_of(first, "x", "y") == ([{"x": "a", "y": 1}], 2)
    assert rows_of(write(first, x=["b"], y=[1]), "x") == ([{"x": "b"}], 3)


def test_a_cached_file_is_there_whole_or_not_at_all(tmp_path):
    def half(path):
        path.write_text("half")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        cached_file(tmp_path, "kind", ".txt", half, of=1)
    assert not list(tmp_path.iterdir())
    path = cached_file(tmp_path, "kind", ".txt", lambda path: path.write_text("whole"), of=1)
    assert path.read_text() == "whole"
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*\.txt/cache cannot be written"):
        cached_file(path / "cache", "kind", ".txt", half, of=1)


def test_rows_travel_to_another_process_by_path(tmp_path):
    rows = ParquetRows([write(tmp_path / "a.parquet", x=["a" * 100_000, "b"])], ["x"], tmp_path / "cache")
    assert rows[1] == {"x": "b"}
    packed = pickle.dumps(rows)
    assert len(packed) < 2000
    assert pickle.loads(packed)[1] == {"x": "b"}

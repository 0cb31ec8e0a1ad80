"""Files, folders, globs, and rows over files whose columns differ."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.utils.dataset.parquet_files import ParquetRows, column_names, expand_data_files


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


@pytest.mark.parametrize("missing", ["none.parquet", "*.parquet", "empty"])
def test_what_stands_for_no_file_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data file") as caught:
        expand_data_files(str(tmp_path / missing))
    assert missing in str(caught.value)


def test_no_files_at_all():
    with pytest.raises(ValueError, match="no data file is given"):
        expand_data_files([])
    with pytest.raises(ValueError, match="data file ''"):
        expand_data_files([""])  # not the current folder


def test_rows_over_files_with_different_columns(tmp_path):
    files = [
        write(tmp_path / "a=1" / "one.parquet", x=["p", "q"], y=[1, 2], unused=[0, 0]),
        write(tmp_path / "two.parquet", x=pa.array(["r"]).dictionary_encode()),
        write(tmp_path / "three.parquet", x=pa.array(["s"], pa.large_string()), y=pa.nulls(1)),
    ]
    rows = ParquetRows(files, ["x", "y"])
    expected = [{"x": "p", "y": 1}, {"x": "q", "y": 2}, {"x": "r"}, {"x": "s", "y": None}]
    assert list(rows) == [rows[i] for i in range(4)] == expected
    assert len(rows) == 4
    assert rows.columns == {"x", "y"}
    assert rows.location(1) == (files[0], 1)
    assert rows.location(3) == (files[2], 0)
    assert column_names(files) == {"x", "y", "unused"}


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory):
    """A parquet file of which something can be cut off."""
    rows = [f"row {number} {number * 7919 % 1000}" for number in range(5000)]
    return write(tmp_path_factory.mktemp("whole") / "whole.parquet", x=rows).read_bytes()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("d.parquet", lambda whole: b"", "it is empty (0 bytes)"),
        ("d.csv", lambda whole: b"a,b\n1,2\n", "it is a CSV file; convert it to parquet"),
        ("d.jsonl", lambda whole: b'{"a": 1}\n', "it is a JSONL file; convert it to parquet"),
        ("d.parquet", lambda whole: b"a,b\n1,2\n", r"it does not begin as one (b'a,b\n' instead of b'PAR1')"),
        ("d.parquet", lambda whole: whole[:5000], "its end is missing after 5,000 bytes; it was cut off"),
        ("d.parquet", lambda whole: whole[:100] + bytes(2000) + whole[2100:], "it is damaged ("),
        ("d.parquet", lambda whole: whole[:-300] + whole[-8:], "it is damaged ("),
    ],
)
def test_a_file_that_is_no_parquet_gives_one_clear_line(tmp_path, parquet_bytes, name, spoil, message):
    path = tmp_path / name
    path.write_bytes(spoil(parquet_bytes))
    with pytest.raises(ValueError, match="cannot be read as parquet: ") as caught:
        ParquetRows([path], ["x"])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_without_a_row(tmp_path):
    none = write(tmp_path / "none.parquet", x=pa.array([], pa.string()))
    with pytest.raises(ValueError, match=r"none\.parquet: there is not a single row"):
        ParquetRows([none], ["x"])
    rows = ParquetRows([none, write(tmp_path / "one.parquet", x=["a"]), none], ["x"])
    assert list(rows) == [rows[0]] == [{"x": "a"}]
    assert rows.location(0) == (tmp_path / "one.parquet", 0)


def test_files_without_a_column_that_is_asked_for(tmp_path):
    rows = ParquetRows([write(tmp_path / "y.parquet", y=[1, 2]), write(tmp_path / "x.parquet", x=["a"])], ["x"])
    assert list(rows) == [rows[row] for row in range(3)] == [{}, {}, {"x": "a"}]


def test_a_cell_that_python_cannot_hold_costs_no_other(tmp_path):
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfea")]
    )
    date = pa.array([0, 2**50], pa.timestamp("ms"))
    rows = ParquetRows([write(tmp_path / "d.parquet", x=text, y=date)], ["x", "y"])
    assert [row["x"] for row in rows] == [b"\xff\xfe", "a"]
    assert isinstance(rows[1]["y"], str)
    assert rows[0]["y"].year == 1970


def test_copies_are_made_once_and_for_the_content(tmp_path):
    cache = tmp_path / "cache"

    def copies():
        return sorted((path.name, path.stat().st_mtime_ns) for path in cache.iterdir())

    first = write(tmp_path / "a.parquet", x=["a"], y=[1])
    assert list(ParquetRows([first], ["x"], cache)) == [{"x": "a"}]
    (made,) = copies()
    same = write(tmp_path / "elsewhere" / "b.parquet", x=["a"], y=[1])
    assert list(ParquetRows([same], ["x"], cache)) == [{"x": "a"}]
    assert copies() == [made]
    assert list(ParquetRows([first], ["x", "y"], cache)) == [{"x": "a", "y": 1}]
    write(tmp_path / "a.parquet", x=["b"], y=[1])
    assert list(ParquetRows([first], ["x"], cache)) == [{"x": "b"}]
    assert len(copies()) == 3


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", x=["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*/file/cache cannot be written"):
        ParquetRows([path], ["x"], tmp_path / "file" / "cache")


def test_rows_travel_to_another_process_by_path(tmp_path):
    rows = ParquetRows([write(tmp_path / "a.parquet", x=["a" * 100_000, "b"])], ["x"])
    assert rows[1] == {"x": "b"}
    packed = pickle.dumps(rows)
    assert len(packed) < 2000
    assert pickle.loads(packed)[1] == {"x": "b"}

"""Files, folders, globs, and rows over files whose columns differ."""

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


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PAR1 and then nothing"])
def test_a_file_that_is_no_parquet_gives_one_clear_line(tmp_path, content):
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a parquet file") as caught:
        ParquetRows([path], ["x"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)

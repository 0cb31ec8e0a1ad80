"""Files that are whole or not there."""

from pathlib import Path

import pytest
from support.file_faults import disk_full_text

from verl.utils.durable_files import file_sizes, flush_tree, write_durably


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step.txt"
    write_durably(path, "2\n")
    with disk_full_text(0), pytest.raises(OSError, match="File too large"):
        write_durably(path, "4\n")
    assert path.read_text() == "2\n"
    write_durably(path, b"6\n")
    assert path.read_text() == "6\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.txt"], "nothing is left beside it"


def test_sizes_are_told_by_path_over_all_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"")
    flush_tree(tmp_path)
    assert file_sizes(tmp_path) == {"a/x": 3, "y": 0}

"""Files that are whole or not there."""

from pathlib import Path

import pytest
from support.file_faults import full_disk

from verl.utils.durable_files import write_durably


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step.txt"
    write_durably(path, "2\n")
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        write_durably(path, "4\n")
    assert path.read_text() == "2\n"
    write_durably(path, b"6\n")
    assert path.read_text() == "6\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.txt"], "nothing is left beside it"

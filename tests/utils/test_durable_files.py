"""Files that are whole or not there."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.file_faults import full_disk

from verl.utils.durable_files import hold_folder, write_durably


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step.txt"
    write_durably(path, "2\n")
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        write_durably(path, "4\n")
    assert path.read_text() == "2\n"
    write_durably(path, b"6\n")
    assert path.read_text() == "6\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.txt"], "nothing is left beside it"


def test_a_folder_is_held_until_the_process_ends(tmp_path: Path) -> None:
    program = (
        "import sys; from verl.utils.durable_files import hold_folder; print(hold_folder(sys.argv[1]), flush=True)"
    )
    command = [sys.executable, "-c", f"{program}; sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert not hold_folder(tmp_path)
        other.communicate("")
    assert hold_folder(tmp_path) and hold_folder(tmp_path / "."), "the process that has it may ask again"

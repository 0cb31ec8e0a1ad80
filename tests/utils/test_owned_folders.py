"""Folders of processes that are gone are removed, and no others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.tiny_pairs import REPO

from verl.utils.durable_files import make_owned_folder, remove_abandoned

OWNER = """
import sys, time
from pathlib import Path
from verl.utils.durable_files import make_owned_folder
print(make_owned_folder(Path(sys.argv[1]), "weights-").path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().strip())
    (theirs / "bucket").write_bytes(b"w")
    ours = make_owned_folder(tmp_path, "weights-")
    (tmp_path / "other").mkdir()
    (tmp_path / "weights-file").write_text("")
    remove_abandoned(tmp_path, "weights-")
    assert theirs.exists() and ours.path.exists()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    remove_abandoned(tmp_path, "weights-")
    assert sorted(tmp_path.iterdir()) == sorted([ours.path, tmp_path / "other", tmp_path / "weights-file"])
    assert ours.path.stat().st_mode & 0o777 == 0o700
    ours.remove()
    assert not ours.path.exists()

"""Temporary folders that do not outlive their process: what a killed process left, the next one removes.

Each folder is locked while its process lives, and the system releases the lock however the process ends. A folder that
can be locked is therefore abandoned. This matters in shared memory, which nobody else would free.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class OwnedFolder(NamedTuple):
    """A folder that only this user may read, and this process's lock on it."""

    path: Path
    lock: int

    def remove(self) -> None:
        """Delete the folder and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def make_owned_folder(parent: Path, prefix: str) -> OwnedFolder:
    """A new folder of this process.

    Raises:
        OSError: it cannot be created.
    """
    new = Path(tempfile.mkdtemp(prefix=f"new-{prefix}", dir=parent))  # no name that `remove_abandoned` looks for
    lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Renamed once it is locked: under its final name it is never there unlocked.
    return OwnedFolder(new.rename(new.with_name(new.name.removeprefix("new-"))), lock)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove this user's folders of that prefix whose processes have ended."""
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # it is locked, or another user's
            # Others may write to this folder too, so a link is not followed.
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Asked of what was locked, whatever has the name by now.
                if os.fstat(lock).st_uid == os.getuid():
                    logger.info("removing %s, which a killed run left", path)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)

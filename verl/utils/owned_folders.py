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
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(path)
        if lock is not None and path.exists():
            return OwnedFolder(path, lock)
        if lock is not None:  # `remove_abandoned` of another process was quicker than the lock
            os.close(lock)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove this user's folders of that prefix whose processes have ended."""
    for path in parent.glob(f"{prefix}*"):
        lock = _lock(path)
        if lock is not None:
            logger.info("removing %s, which a killed run left", path)
            OwnedFolder(path, lock).remove()


def _lock(path: Path) -> int | None:
    """Lock a folder; None if another process holds the lock, or this user has no such folder."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with suppress(BlockingIOError):
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
        os.close(descriptor)
    return None

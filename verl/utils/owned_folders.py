"""Temporary folders that outlive no owner: what a killed process left is found and removed by the next one.

Each is locked for as long as its process lives; the system takes the lock away however that ends. A folder that can be
locked is therefore nobody's. In shared memory that matters: what is left there is memory that nobody gets back.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class OwnedFolder(NamedTuple):
    """A folder that only this user may read, and this process's lock on it."""

    path: Path
    lock: int

    def remove(self) -> None:
        """Delete it, then give the lock back."""
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
        if lock is not None:  # `remove_abandoned` elsewhere was quicker than the lock
            os.close(lock)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove this user's folders of that prefix whose processes are gone."""
    for path in parent.glob(f"{prefix}*"):
        lock = _lock(path)
        if lock is None:
            continue
        logger.info("removing %s, which a killed run left", path)
        OwnedFolder(path, lock).remove()


def _lock(path: Path) -> int | None:
    """A lock on a folder; None where another process has it, or there is no such folder of this user."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None

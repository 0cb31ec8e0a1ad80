"""Files that a crash leaves whole or not at all, and temporary folders that do not outlive their process.

In: bytes and paths. Out: files whose content has reached the disk, and folders whose entries have. A file is replaced
by writing beside it and renaming, so that a reader sees the old content or the new one and never a part.

A temporary folder is locked while its process lives, and the system releases the lock however the process ends. A
folder that can be locked is therefore abandoned, and the next process removes it. This matters in shared memory, which
nobody else would free.
"""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


def write_durably(path: Path, content: bytes | str) -> None:
    """Replace a file; when this returns, the new content is on the disk.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is unchanged.
    """
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        # Before the rename, or a power cut could leave the new name with nothing in it.
        flush(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file's content, or a folder's entries, to the disk: a rename is not there before its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything below it."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its relative path, sorted."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------ folders of a process

_HELD: dict[Path, int] = {}
"""Descriptors of locked files, open until this process ends: closing any of them would give up its lock."""


def hold_folder(folder: str | Path) -> bool:
    """Take a folder for this process, until it ends; made where it is not there. False: another process has it.

    The lock is of the kind that children do not inherit. A file system without locks refuses nobody.

    Raises:
        OSError: the folder cannot be written.
    """
    if (path := Path(folder).resolve() / ".lock") not in _HELD:
        path.parent.mkdir(parents=True, exist_ok=True)
        _HELD[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(_HELD[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


# ------------------------------------------------------------------ temporary folders


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

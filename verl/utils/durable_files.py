"""Files that a crash leaves whole or not at all.

In: bytes and paths. Out: files whose content has reached the disk, and folders whose entries have. A file is replaced
by writing beside it and renaming, so that a reader sees the old content or the new one and never a part.
"""

import os
from pathlib import Path


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

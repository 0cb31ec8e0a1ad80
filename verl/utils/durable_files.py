"""Files that a crash leaves whole or not at all.

In: bytes and paths. Out: files whose content has reached the disk, and folders whose entries have. A file is replaced
by writing beside it and renaming, so that a reader sees the old content or the new one and never a part. Nothing here
knows what the files mean.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def write_durably(path: Path, content: bytes | str) -> None:
    """Replace a file; when this returns, the new content is on the disk.

    Raises:
        OSError: no room, no right, no such folder. The old file is as it was.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    flush_entries(path.parent)


def flush_entries(folder: Path) -> None:
    """Have the names in a folder on the disk: a rename is not, before its folder is."""
    _flush(folder)


def flush_tree(folder: Path) -> None:
    """Have everything below a folder on the disk, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path from there, in order."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that cannot be read because they are Git LFS pointers: lines of text that a clone without git-lfs leaves."""

from pathlib import Path

POINTER = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Whether a file is there and is a pointer."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def describe_damage(path: Path, error: Exception, fix: str) -> str:
    """Why a file cannot be read, in one line, and the fix; of a pointer, that it is one and how to get the file."""
    if is_pointer(path):
        return "it is a Git LFS pointer in place of the file; run git lfs pull where it was cloned"
    reason = str(error).strip().partition("\n")[0].removesuffix(".")
    return f"{reason}; {fix}"

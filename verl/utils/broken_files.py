"""Files that cannot be read: no JSON, or a Git LFS pointer, lines of text that a clone without git-lfs leaves."""

import json
from pathlib import Path
from typing import Any

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


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """What a JSON file holds; an empty object without it.

    Raises:
        ValueError: it is not JSON; the message ends in ``fix``.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {describe_damage(path, error, fix)}") from error

"""Folders that are made once and found again, as long as nothing that decides what is in them has changed.

A folder's name ends in a digest of its key, so another seed, size, setting or source text means another folder. A
folder appears under its name only when it is complete.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KEY_FILE = "key.json"


def cached_folder(folder: Path, name: str, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Return ``folder/<name>-<digest of key>``, filled by ``make`` where it is not there yet.

    Args:
        folder: holds all cached folders; made where absent.
        name: what the folder is, for people.
        key: everything that decides the contents, as JSON values.
        make: called with an empty folder to write into.
    """
    target = folder / f"{name}-{key_digest(key)}"
    if (target / KEY_FILE).is_file():
        logger.info("reused: %s", target)
        return target
    unfinished = folder / f"{target.name}.unfinished-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        make(unfinished)
        (unfinished / KEY_FILE).write_text(_text_of(key) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def key_digest(key: Any) -> str:
    """What a folder's name has of its key, JSON values."""
    return hashlib.sha256(_text_of(key).encode()).hexdigest()[:12]


def _text_of(key: Any) -> str:
    return json.dumps(key, sort_keys=True, indent=2)


def file_digest(*paths: str | Path) -> str:
    """A digest of files' contents: models, data, or source text, whose change makes its results anew."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]

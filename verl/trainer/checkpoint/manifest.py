"""The list that makes a checkpoint whole.

``manifest.json`` is the last file written into a checkpoint. It names every other file with its size, and says of what
run the checkpoint is::

    {"step": 100, "world_size": 8, "facts": {"student.config.hidden_size": 4096, ...},
     "files": {"actor/shards/__0_0.distcp": 1234, ...}}

A checkpoint without it was never finished; one whose files are not those of the list was damaged later. Contents are
not read again: a file of the right size counts as the one that was written. ``actor/huggingface/`` is made to be taken
away: a run that resumes does not read it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from verl.utils.durable_files import file_sizes, flush_tree, write_durably

MANIFEST = "manifest.json"
EXPORT = "actor/huggingface/"
SHOWN_FAULTS = 5


class Manifest(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    world_size: int
    """Training ranks that wrote it."""
    facts: dict[str, Any]
    """Of the run it belongs to; see ``resume_check.run_facts``."""
    files: dict[str, int]
    """Bytes by path below the checkpoint's folder."""


def seal(folder: Path, step: int, world_size: int, facts: dict[str, Any]) -> None:
    """Declare what lies in a folder a whole checkpoint, once all of it is on the disk.

    Raises:
        OSError: it is not.
    """
    flush_tree(folder)
    manifest = Manifest(step, world_size, facts, file_sizes(folder))
    write_durably(folder / MANIFEST, json.dumps(manifest._asdict(), indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"it holds no {MANIFEST}, so its writing was never finished") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({error})") from error


def find_faults(folder: Path) -> list[str]:
    """What keeps a checkpoint from being whole, in words; nothing where it is whole."""
    if not folder.is_dir():
        return ["it is not there"]
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    found = file_sizes(folder)
    faults = [
        f"{name} has {found[name]} of {size} bytes" if name in found else f"{name} is missing"
        for name, size in manifest.files.items()
        if found.get(name) != size and not name.startswith(EXPORT)
    ]
    return faults if len(faults) <= SHOWN_FAULTS else [*faults[:SHOWN_FAULTS], f"and {len(faults) - SHOWN_FAULTS} more"]

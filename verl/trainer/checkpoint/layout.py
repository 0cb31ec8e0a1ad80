"""Where checkpoints lie, which of them are whole, and how they come and go.

::

    default_local_dir/
        latest_checkpointed_iteration.txt      step of the newest checkpoint
        best_checkpointed_iteration.txt, best/ where trainer.best_metric is set (``best``)
        global_step_N/actor/                   model and optimizer, written by the training workers
        global_step_N/data.pt                  state of the driver, such as the position in the training data
        global_step_N/config.yaml              settings of the run, without secrets
        global_step_N/manifest.json            written last: every other file with its size, and the run's identity
        global_step_N.unfinished/              being written, or left by a run that was killed while it wrote
        global_step_N.deleted/                 being deleted, or left likewise

    .unfinished ──seal──► whole ──rename──► global_step_N ──► latest_... ──► older ones renamed to .deleted, removed

A checkpoint without manifest was never finished; one whose files differ in size from the manifest was damaged later.
Contents are not read again. A run that resumes does not read ``actor/huggingface/``, so that folder may be taken away.

Not here: when to save (``saver``), and whether a checkpoint fits the run (``resume``).
"""

import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from verl.config import TrainerConfig
from verl.utils.durable_files import file_sizes, flush, flush_tree, write_durably

logger = logging.getLogger(__name__)

LATEST, MANIFEST, DRIVER_STATE = "latest_checkpointed_iteration.txt", "manifest.json", "data.pt"
EXPORT = "actor/huggingface/"
UNFINISHED, DELETED = ".unfinished", ".deleted"
_STEP_FOLDER = re.compile(r"global_step_\d+$")
_LEFTOVER = re.compile(r"global_step_\d+(\.unfinished|\.deleted)$")
SHOWN_FAULTS = 5


# ------------------------------------------------------------------ names


def step_folder(root: str | Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return Path(root) / f"global_step_{step}"


def unfinished_folder(root: str | Path, step: int) -> Path:
    """Folder that the checkpoint of one step is written to."""
    return Path(root) / f"global_step_{step}{UNFINISHED}"


def checkpoint_step(folder: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    return int(folder.stem.rpartition("_")[2])


def step_folders(root: str | Path) -> list[Path]:
    """All checkpoints of a run folder, whole or not, the newest first."""
    folders = [path for path in Path(root).glob("global_step_*") if _STEP_FOLDER.search(path.name)]
    return sorted(folders, key=checkpoint_step, reverse=True)


# ------------------------------------------------------------------ the manifest


class Manifest(NamedTuple):
    """Content of ``manifest.json``."""

    step: int
    world_size: int
    """Training ranks that wrote the checkpoint."""
    identity: dict[str, Any]
    """Models and data of the run; see ``resume.run_identity``."""
    files: dict[str, int]
    """Size in bytes by path below the checkpoint's folder."""


def seal(folder: Path, step: int, world_size: int, identity: dict[str, Any]) -> None:
    """Flush all files of a checkpoint to the disk, then write its manifest.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    flush_tree(folder)
    manifest = Manifest(step, world_size, identity, file_sizes(folder))
    write_durably(folder / MANIFEST, json.dumps(manifest._asdict(), indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "facts" in content:  # the name of before
            content["identity"] = content.pop("facts")
        return Manifest(**content)
    except FileNotFoundError:
        raise ValueError(f"it holds no {MANIFEST}, so its writing was never finished") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({error})") from error


def find_faults(folder: Path) -> list[str]:
    """Why a checkpoint is not whole, as short texts; empty if it is whole."""
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


# ------------------------------------------------------------------ finding


def find_checkpoint(config: TrainerConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    ``resume_mode=auto`` takes the newest one; if that is damaged, it warns and takes the newest whole one before it.

    Raises:
        ValueError: ``resume_from_path`` is not a whole checkpoint, or there are checkpoints and all are damaged.
    """
    if config.resume_mode == "disable":
        return None
    if config.resume_mode == "resume_path":
        named = Path(str(config.resume_from_path))
        faults = find_faults(named) if _STEP_FOLDER.search(named.name) else ["it is not a folder global_step_N"]
        if faults:
            raise ValueError(
                f"trainer.resume_from_path={named} is not whole: {', '.join(faults)}; name another checkpoint"
            )
        return named
    damage: list[str] = []
    for folder in _newest_first(Path(config.default_local_dir)):
        faults = find_faults(folder)
        if not faults:
            if damage:
                logger.warning("resuming from the older %s, because %s", folder, "; ".join(damage))
            return folder
        damage.append(f"{folder} is not whole: {', '.join(faults)}")
    if not damage:
        return None
    raise ValueError(
        f"trainer.resume_mode=auto finds no whole checkpoint in trainer.default_local_dir={config.default_local_dir}; "
        "set trainer.resume_mode=disable to start afresh:\n" + "\n".join(f"- {line}" for line in damage)
    )


def _newest_first(root: Path) -> list[Path]:
    """The checkpoint that was finished last, there or not, and the ones of earlier steps."""
    latest, folders = root / LATEST, step_folders(root)
    if not latest.is_file():
        return []
    text = latest.read_text().strip()
    if not text.isdecimal():
        logger.warning("%s has %r instead of a step; taking the newest folder", latest, text)
        return folders
    return [step_folder(root, int(text)), *(path for path in folders if checkpoint_step(path) < int(text))]


def newest_whole(root: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    return next((folder for folder in step_folders(root) if not find_faults(folder)), None)


def is_of_run(folder: Path, root: str | Path) -> bool:
    """Whether a checkpoint lies in this run's own folder."""
    return folder.resolve().parent == Path(root).resolve()


# ------------------------------------------------------------------ putting into place, deleting


def publish(root: str | Path, step: int) -> None:
    """Give a sealed checkpoint its name and make it the latest.

    Raises:
        OSError: the folder cannot be written.
    """
    replace_folder(unfinished_folder(root, step), step_folder(root, step))
    write_durably(Path(root) / LATEST, f"{step}\n")


def replace_folder(source: Path, folder: Path) -> None:
    """Rename ``source`` to ``folder``, then delete the folder of that name if there was one.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder.exists():
        _move_to_deleted(folder)
    source.rename(folder)
    flush(folder.parent)
    _remove(folder.with_name(folder.name + DELETED))


def clear_leftovers(root: str | Path) -> None:
    """Publish a checkpoint that a killed run had sealed, and remove its unfinished and half-deleted ones.

    Raises:
        OSError: the folder cannot be written.
    """
    left = [path for path in Path(root).glob("global_step_*.*") if _LEFTOVER.search(path.name)]
    # .unfinished first: it may replace what is in .deleted.
    for path in sorted(left, key=lambda path: path.suffix, reverse=True):
        step = checkpoint_step(path)
        if path.suffix == UNFINISHED and not find_faults(path) and not step_folder(root, step).exists():
            logger.warning("%s is whole and was not yet in place; it is now", path)
            publish(root, step)
        else:
            logger.info("removing %s, which an earlier run left", path)
            _remove(path)


def prune_checkpoints(root: str | Path, keep: int | None, current: int, protected: Collection[int] = ()) -> None:
    """Delete checkpoints that are older than the ``keep`` newest whole ones.

    Those of later steps than ``current`` belong to another run in the same folder and stay.

    Args:
        keep: how many stay, ``current`` included; None: all.
        current: step of the checkpoint that was just published.
        protected: steps that stay too.
    """
    if keep is None:
        return
    own = [path for path in step_folders(root) if checkpoint_step(path) <= current]
    whole = [path for path in own if not find_faults(path)]
    if len(whole) < keep:
        return
    for folder in own[own.index(whole[keep - 1]) + 1 :]:
        if checkpoint_step(folder) not in protected:
            _remove(_move_to_deleted(folder))


def _move_to_deleted(folder: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that a half-deleted one never has a checkpoint's name."""
    deleted = folder.with_name(folder.name + DELETED)
    _remove(deleted)
    folder.rename(deleted)
    flush(folder.parent)
    return deleted


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)

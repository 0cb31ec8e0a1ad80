"""Where checkpoints lie, which of them are whole, and how they come and go.

::

    default_local_dir/
        latest_checkpointed_iteration.txt      step of the newest checkpoint
        best/                                  where trainer.best_metric is set (``best``)
        .lock                                  held by the process that trains here
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
from typing import Any

from verl.config import TrainerConfig
from verl.utils.durable_files import file_sizes, flush, flush_tree, write_durably

logger = logging.getLogger(__name__)

LATEST, MANIFEST, DRIVER_STATE = "latest_checkpointed_iteration.txt", "manifest.json", "data.pt"
EXPORT = "actor/huggingface/"
UNFINISHED, DELETED = ".unfinished", ".deleted"
VERL_SHARDS = "model_world_size_*_rank_*.pt"
UNMERGED = "its weights are shards of a checkpoint; merge them with the model_merger of what wrote them, and give that"
_STEP_FOLDER = re.compile(r"global_step_\d+")


class NothingToTrain(Exception):
    """The run has taken all its steps; no error, so that a scheduler that starts it again sees success."""


# ------------------------------------------------------------------ names


def step_folder(root: str | Path, step: int, suffix: str = "") -> Path:
    """Folder of the checkpoint of one step, with `UNFINISHED` the one that it is written to."""
    return Path(root) / f"global_step_{step}{suffix}"


def checkpoint_step(folder: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    # The stem leaves out .unfinished and .deleted.
    return int(folder.stem.rpartition("_")[2])


def step_folders(root: str | Path) -> list[Path]:
    """All checkpoints of a run folder, whole or not, the newest first."""
    # The glob finds the folders with a suffix too.
    folders = [path for path in Path(root).glob("global_step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=checkpoint_step, reverse=True)


# ------------------------------------------------------------------ the manifest


def seal(folder: Path, identity: dict[str, Any]) -> None:
    """Flush all files of a checkpoint to the disk, then write its manifest with their sizes.

    Args:
        identity: models and data of the run; see ``resume.run_identity``.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    # Content before the manifest: after a power cut it must not vouch for files that never reached the disk.
    flush_tree(folder)
    manifest = {"identity": identity, "files": file_sizes(folder)}
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote of a checkpoint."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def find_faults(folder: Path) -> list[str]:
    """Why a checkpoint is not whole, as short texts; empty if it is whole."""
    try:
        # The identity is read to see that it is there: a resume compares it.
        sizes, _ = (read_manifest(folder)[key] for key in ("files", "identity"))
    except FileNotFoundError:
        if any(folder.glob(f"actor/{VERL_SHARDS}")):
            return [f"verl wrote it, {UNMERGED} as actor_rollout_ref.model.path"]
        return [f"it holds no {MANIFEST}, so its writing was never finished" if folder.exists() else "it is not there"]
    except (ValueError, KeyError) as error:
        return [f"its {MANIFEST} is damaged or of another version of this program ({error})"]
    found = file_sizes(folder)
    return [
        f"{name} has {found[name]} of {size} bytes" if name in found else f"{name} is missing"
        for name, size in sizes.items()
        if found.get(name) != size and not name.startswith(EXPORT)
    ]


# ------------------------------------------------------------------ finding


def find_checkpoint(config: TrainerConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    ``resume_mode=auto`` takes the one that was finished last, by its file or else the newest; if that is damaged, it
    warns and takes the newest whole one before it.

    Raises:
        ValueError: ``resume_from_path`` is not a whole checkpoint, or stands there without the mode that reads it;
            there are checkpoints and all are damaged, or the file that names the latest holds no step.
    """
    latest, candidates = Path(config.default_local_dir) / LATEST, []
    if config.resume_mode == "resume_path":
        candidates = [Path(str(config.resume_from_path))]
    elif config.resume_mode == "auto" and not latest.is_file():
        candidates = step_folders(latest.parent)
    elif config.resume_mode == "auto":
        text = latest.read_text().strip()
        if not text.isdecimal():
            raise ValueError(f"{latest} holds {text!r}, not a step; write the step of the newest checkpoint into it")
        step = int(text)
        # Later folders are left from before a resume at an older step, or were never made the latest.
        older = [path for path in step_folders(latest.parent) if checkpoint_step(path) < step]
        candidates = [step_folder(latest.parent, step), *older]
    damage: list[str] = []
    for folder in candidates:
        faults = find_faults(folder) if _STEP_FOLDER.fullmatch(folder.name) else ["it is not named global_step_N"]
        if not faults:
            if damage:
                logger.warning("resuming from the older %s, because\n%s", folder, "\n".join(damage))
            return folder
        damage.append(f"- {folder} is not whole: {', '.join(faults[:5])}")
    if not damage:
        if config.resume_mode == "auto" and config.resume_from_path:
            what = f"trainer.resume_from_path={config.resume_from_path} is read with trainer.resume_mode=resume_path"
            raise ValueError(f"{what}, and {config.default_local_dir} has no checkpoint; set the mode, or leave it out")
        return None
    raise ValueError(
        f"trainer.resume_mode={config.resume_mode} finds no whole checkpoint; name one in trainer.resume_from_path, or "
        "set trainer.resume_mode=disable to start afresh:\n" + "\n".join(damage)
    )


def newest_whole(root: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder; later ones than the last published are of another run."""
    text = latest.read_text().strip() if (latest := Path(root) / LATEST).is_file() else ""
    folders = [folder for folder in step_folders(root) if not text.isdecimal() or checkpoint_step(folder) <= int(text)]
    return next((folder for folder in folders if not find_faults(folder)), None)


def is_of_run(folder: Path, root: str | Path) -> bool:
    """Whether a checkpoint lies in this run's own folder."""
    return folder.resolve().parent == Path(root).resolve()


# ------------------------------------------------------------------ putting into place, deleting


def publish(root: str | Path, step: int) -> None:
    """Give a sealed checkpoint its name and make it the latest.

    Raises:
        OSError: the folder cannot be written.
    """
    deleted = replace_folder(step_folder(root, step, UNFINISHED), step_folder(root, step))
    # A kill before this line: the run goes on from the checkpoint before, and replaces this folder later.
    write_durably(Path(root) / LATEST, f"{step}\n")
    try:  # last, for the checkpoint counts by then
        remove_folder(deleted)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", deleted, error)


def replace_folder(source: Path, folder: Path) -> Path:
    """Rename ``source`` to ``folder``; returns where a folder of that name went, for the caller to remove.

    Raises:
        OSError: the folder cannot be written.
    """
    # No rename replaces a folder that holds files. A kill between the two renames leaves a whole .unfinished,
    # which clear_leftovers puts into place.
    deleted = _move_to_deleted(folder)
    source.rename(folder)
    flush(folder.parent)
    return deleted


def clear_leftovers(root: str | Path) -> None:
    """Publish a checkpoint that a killed run had sealed, and remove its unfinished and half-deleted ones.

    Raises:
        OSError: the folder cannot be written.
    """
    for suffix in (UNFINISHED, DELETED):  # in this order: what is unfinished may replace what is in .deleted
        for path in Path(root).glob(f"global_step_*{suffix}"):
            step = checkpoint_step(path)
            if suffix == UNFINISHED and not find_faults(path) and not step_folder(root, step).exists():
                logger.warning("%s is whole and was not yet in place; it is now", path)
                publish(root, step)
            remove_folder(path)


def prune_checkpoints(root: Path, keep: int | None, current: int, protected: Collection[int | None]) -> None:
    """Delete checkpoints that are older than the ``keep`` newest whole ones.

    Those of later steps than ``current`` belong to another run in the same folder and stay.

    Args:
        keep: how many stay, ``current`` included; None: all.
        current: step of the checkpoint that was just published.
        protected: steps that stay too.
    """
    own = [path for path in step_folders(root) if checkpoint_step(path) <= current]
    whole = [path for path in own if not find_faults(path)]
    if keep is None or len(whole) < keep:
        return
    # Cut after a whole one: broken folders take no place from those that can be resumed.
    for folder in own[own.index(whole[keep - 1]) + 1 :]:
        if checkpoint_step(folder) not in protected:
            remove_folder(_move_to_deleted(folder))


def _move_to_deleted(folder: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that a half-deleted one never has a checkpoint's name."""
    deleted = folder.with_name(folder.name + DELETED)
    remove_folder(deleted)
    if folder.exists():
        folder.rename(deleted)
        flush(folder.parent)
    return deleted


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)

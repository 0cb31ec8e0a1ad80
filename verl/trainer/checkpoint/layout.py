"""Where checkpoints lie and which one is the newest.

Layout, as verl's, with what makes it survive a kill at any instant::

    default_local_dir/
        latest_checkpointed_iteration.txt      step of the newest checkpoint
        best_checkpointed_iteration.txt, best/ where trainer.best_metric is set (``best_checkpoint``)
        global_step_N/actor/                   written by the training workers
        global_step_N/data.pt                  position in the training data
        global_step_N/config.yaml              settings of the run, without secrets
        global_step_N/manifest.json            written last: every file and its size
        global_step_N.unfinished/              being written, or left by a run that was killed while it wrote
        global_step_N.deleted/                 being deleted, or left likewise

    .unfinished ──seal──► whole ──rename──► global_step_N ──► latest_... ──► older ones renamed to .deleted, removed

Reads and writes only this layout; model state is the workers' business, when to save is the saver's.
"""

import io
import logging
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from verl.config import TrainerConfig
from verl.trainer.checkpoint.manifest import find_faults
from verl.utils.durable_files import flush_entries, write_durably

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
DATA_STATE = "data.pt"
UNFINISHED, DELETED = ".unfinished", ".deleted"
_STEP_FOLDER = re.compile(r"global_step_(\d+)$")
_LEFTOVER = re.compile(r"global_step_(\d+)(\.unfinished|\.deleted)$")


@dataclass
class DataState:
    """What the driver itself has to remember."""

    loader: dict[str, Any] | None
    """State of the data loader; None: the data start over."""
    epoch: int
    prompts: int
    """Usable prompts of the training data."""
    batch_size: int
    num_workers: int
    """Processes of the data loader, on which the form of its state depends."""
    kl_coef: float
    """Weight of the KL penalty in the reward, which an adaptive controller moves."""
    canary: dict[str, Any] | None = None
    """What the teachers scored at the run's first start; see ``teacher_canary``."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the step, but for the seconds of its save; empty where they were not kept. See ``run_position``."""


# ------------------------------------------------------------------ names


def step_folder(root: str | Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return Path(root) / f"global_step_{step}"


def unfinished_folder(root: str | Path, step: int) -> Path:
    """Where that checkpoint is written before it is whole."""
    return Path(root) / f"global_step_{step}{UNFINISHED}"


def checkpoint_step(folder: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    match = _STEP_FOLDER.search(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named global_step_N")
    return int(match.group(1))


def step_folders(root: str | Path) -> list[Path]:
    """All checkpoints of a run's folder, whole or not, the newest first."""
    folders = [path for path in Path(root).glob("global_step_*") if _STEP_FOLDER.search(path.name)]
    return sorted(folders, key=checkpoint_step, reverse=True)


# ------------------------------------------------------------------ finding


def find_checkpoint(config: TrainerConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    ``resume_mode=auto`` takes the newest; where that is damaged, the newest whole one before it, and says so.

    Raises:
        ValueError: ``resume_from_path`` is no whole checkpoint, or there are checkpoints and none of them is whole.
    """
    if config.resume_mode == "disable":
        return None
    if config.resume_mode == "resume_path":
        return _named_checkpoint(Path(str(config.resume_from_path)))
    newest = latest_checkpoint(config.default_local_dir)
    if newest is None:
        return None
    older = [path for path in step_folders(config.default_local_dir) if checkpoint_step(path) < checkpoint_step(newest)]
    damage: list[str] = []
    for folder in (newest, *older):
        faults = find_faults(folder)
        if not faults:
            if damage:
                logger.warning("resuming from the older %s, because %s", folder, "; ".join(damage))
            return folder
        damage.append(f"{folder} is not whole: {', '.join(faults)}")
    raise ValueError(
        f"trainer.resume_mode=auto finds no whole checkpoint in trainer.default_local_dir={config.default_local_dir}; "
        "set trainer.resume_mode=disable to start afresh:\n" + "\n".join(f"- {line}" for line in damage)
    )


def _named_checkpoint(folder: Path) -> Path:
    if not _STEP_FOLDER.search(folder.name):
        raise ValueError(f"trainer.resume_from_path={folder} is no checkpoint; name a folder global_step_N")
    faults = find_faults(folder)
    if faults:
        raise ValueError(
            f"trainer.resume_from_path={folder} is not whole: {', '.join(faults)}; name another checkpoint"
        )
    return folder


def latest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint that was finished last, or None; it may have been damaged since."""
    latest = Path(root) / LATEST
    if not latest.is_file():
        return None
    text = latest.read_text().strip()
    if text.isdecimal():
        return step_folder(root, int(text))
    logger.warning("%s holds no step but %r; taking the newest folder", latest, text)
    return next(iter(step_folders(root)), None)


def newest_whole(root: str | Path) -> Path | None:
    """The newest checkpoint that could be resumed from now."""
    return next((folder for folder in step_folders(root) if not find_faults(folder)), None)


def describe(root: str | Path) -> str:
    """What a run's folder holds, in words."""
    latest = newest_whole(root)
    return f"{f'newest checkpoint {latest}' if latest else 'no checkpoint'}, run folder {root}"


# ------------------------------------------------------------------ the position in the data


def save_data_state(folder: Path, state: DataState) -> None:
    """Keep the position in the training data beside the model.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    torch.save(asdict(state), content)
    write_durably(folder / DATA_STATE, content.getvalue())


def load_data_state(folder: Path, now: DataState, *, may_differ: bool) -> DataState:
    """The saved position in the training data.

    Args:
        now: the state of this run.
        may_differ: start the data over, rather than stop, where the position belongs to other data.

    Raises:
        ValueError: the data, the batch size or the loader's processes are not those that the position belongs to.
    """
    state = DataState(**torch.load(folder / DATA_STATE, weights_only=True))

    def told(of: DataState) -> str:
        return f"{of.prompts} prompts in batches of {of.batch_size} by {of.num_workers} loader processes"

    if told(state) == told(now):
        return state
    difference = f"{folder} was saved after training on {told(state)}, and this run has {told(now)}"
    if not may_differ:
        raise ValueError(
            f"{difference}: its position would repeat some and leave out others; give the same data.* settings, or "
            "start the data over with trainer.resume_allow_changed=[data]"
        )
    logger.warning("%s: the training data start over", difference)
    return replace(state, loader=None, epoch=0)


# ------------------------------------------------------------------ putting into place, deleting


def publish(root: str | Path, step: int) -> None:
    """Give a sealed checkpoint its name and declare it the newest.

    Raises:
        OSError: no right to write.
    """
    folder = step_folder(root, step)
    replaced = _replace_best(unfinished_folder(root, step), folder)
    mark_latest(root, step)
    _remove(replaced)


def replace_folder(beside: Path, folder: Path) -> None:
    """Give a folder that is whole the name of another one in the same place, which goes.

    Raises:
        OSError: no right to do so.
    """
    _remove(_replace_best(beside, folder))


def _replace_best(beside: Path, folder: Path) -> Path:
    """The same, but what was there stays for now; returns where it would lie."""
    if folder.exists():
        _move_to_deleted(folder)
    beside.rename(folder)
    flush_entries(folder.parent)
    return folder.with_name(folder.name + DELETED)


def mark_latest(root: str | Path, step: int) -> None:
    """Declare a finished checkpoint the newest one."""
    write_durably(Path(root) / LATEST, f"{step}\n")


def clear_leftovers(root: str | Path) -> None:
    """Put into place what a killed run had written whole, and remove what it had not, or had begun to delete.

    Raises:
        OSError: no right to do so.
    """
    left = [path for path in Path(root).glob("global_step_*.*") if _LEFTOVER.search(path.name)]
    for path in sorted(left, key=lambda path: path.suffix, reverse=True):  # .unfinished may stand in for .deleted
        step = int(path.stem.rpartition("_")[2])
        if path.suffix == UNFINISHED and not find_faults(path) and not step_folder(root, step).exists():
            logger.warning("%s is whole and was not yet in place; it is now", path)
            publish(root, step)
        else:
            logger.info("removing %s, which an earlier run left", path)
            _remove(path)


def prune_checkpoints(root: str | Path, keep: int | None, current: int, protected: Collection[int] = ()) -> list[Path]:
    """Delete what is older than the ``keep`` newest whole checkpoints of this run; returns the deleted folders.

    Checkpoints of later steps than ``current`` were left by another run in the same folder and are not touched. One
    that is not whole counts for nothing: it goes when it is older than all that stay.

    Args:
        keep: how many stay, ``current`` among them; None: all.
        current: step of the checkpoint that was just put into place.
        protected: steps that stay beside those.
    """
    if keep is None:
        return []
    own = [path for path in step_folders(root) if checkpoint_step(path) <= current]
    whole = [path for path in own if not find_faults(path)]
    if len(whole) < keep:
        return []
    oldest = checkpoint_step(whole[keep - 1])
    stale = [path for path in own if checkpoint_step(path) < oldest and checkpoint_step(path) not in protected]
    for folder in stale:
        _remove(_move_to_deleted(folder))
    return stale


def _move_to_deleted(folder: Path) -> Path:
    """Take a checkpoint's name away, so that what is being deleted is never taken for one; returns where it lies."""
    deleted = folder.with_name(folder.name + DELETED)
    _remove(deleted)
    folder.rename(deleted)
    flush_entries(folder.parent)
    return deleted


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)

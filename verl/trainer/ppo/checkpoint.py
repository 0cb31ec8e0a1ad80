"""Where checkpoints lie and which one is the newest.

Layout, as verl's::

    default_local_dir/
        latest_checkpointed_iteration.txt      step of the newest complete checkpoint
        global_step_N/actor/                   written by the training workers
        global_step_N/data.pt                  position in the training data

Reads and writes only this layout; model state is the workers' business.
"""

import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from verl.trainer.config import TrainerConfig

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
_STEP_FOLDER = re.compile(r"global_step_(\d+)$")


@dataclass
class DataState:
    """What the driver itself has to remember."""

    loader: dict[str, Any]
    """State of the data loader."""
    epoch: int
    prompts: int
    """Usable prompts of the training data."""
    batch_size: int
    kl_coef: float
    """Weight of the KL penalty in the reward, which an adaptive controller moves."""


def step_folder(root: str | Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return Path(root) / f"global_step_{step}"


def find_checkpoint(config: TrainerConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises:
        ValueError: ``resume_from_path`` is no checkpoint folder, or the newest one is incomplete.
    """
    if config.resume_mode == "disable":
        return None
    if config.resume_mode == "resume_path":
        folder = Path(str(config.resume_from_path))
        if not _STEP_FOLDER.search(folder.name) or not (folder / "actor").is_dir():
            raise ValueError(
                f"trainer.resume_from_path={folder} is no checkpoint; name a folder global_step_N that holds actor/"
            )
        return folder
    newest = latest_checkpoint(config.default_local_dir)
    if newest is not None and not (newest / "actor").is_dir():
        raise ValueError(
            f"{Path(config.default_local_dir) / LATEST} names {newest.name}, which holds no actor/; "
            "set trainer.resume_mode=resume_path and trainer.resume_from_path to a whole one, or resume_mode=disable"
        )
    return newest


def latest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint that was finished last, or None."""
    latest = Path(root) / LATEST
    return step_folder(root, int(latest.read_text().strip())) if latest.is_file() else None


def require_steps_left(config: TrainerConfig, total_steps: int) -> None:
    """A run that would resume behind its own end is told so before it starts.

    Raises:
        ValueError: the checkpoint to resume from is at ``total_steps`` or beyond.
    """
    folder = find_checkpoint(config)
    if folder is None or config.val_only or checkpoint_step(folder) < total_steps:
        return
    raise ValueError(
        f"nothing to train: {folder} is at step {checkpoint_step(folder)} and the run ends at step {total_steps}; "
        "raise trainer.total_training_steps, or start afresh with trainer.resume_mode=disable or another "
        "trainer.default_local_dir (OUTPUT_DIR)"
    )


def describe(root: str | Path) -> str:
    """What a run's folder holds, in words."""
    latest = latest_checkpoint(root)
    return f"{f'newest checkpoint {latest}' if latest else 'no checkpoint'}, run folder {root}"


def checkpoint_step(folder: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    match = _STEP_FOLDER.search(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named global_step_N")
    return int(match.group(1))


def save_data_state(folder: Path, state: DataState) -> None:
    """Keep the position in the training data beside the model."""
    torch.save(asdict(state), folder / "data.pt")


def load_data_state(folder: Path, prompts: int, batch_size: int) -> DataState | None:
    """The saved data position, or None (and a warning) where the checkpoint has none.

    Args:
        prompts: usable prompts of this run.
        batch_size: ``data.train_batch_size`` of this run.

    Raises:
        ValueError: the data or the batch size is not what the position belongs to.
    """
    path = folder / "data.pt"
    if not path.is_file():
        logger.warning("%s holds no data.pt: the training data starts over at its first epoch", folder)
        return None
    state = DataState(**torch.load(path, weights_only=False))
    if (state.prompts, state.batch_size) != (prompts, batch_size):
        raise ValueError(
            f"{folder} was saved after training on {state.prompts} prompts in batches of {state.batch_size}, and this "
            f"run has {prompts} in batches of {batch_size}: its position would repeat some and leave out others; give "
            "the same data.* settings, or remove data.pt to start the data over"
        )
    return state


def mark_latest(root: str | Path, step: int) -> None:
    """Declare a finished checkpoint the newest one."""
    path = Path(root) / LATEST
    beside = path.with_suffix(".tmp")
    beside.write_text(f"{step}\n")
    beside.replace(path)


def prune_checkpoints(root: str | Path, keep: int | None, current: int) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints of this run; returns the deleted folders.

    Checkpoints of later steps than ``current`` were left by another run in the same folder and are not touched.

    Args:
        keep: how many stay, ``current`` among them; None: all.
        current: step of the checkpoint that was just written.
    """
    if keep is None:
        return []
    folders = (path for path in Path(root).glob("global_step_*") if _STEP_FOLDER.search(path.name))
    own = sorted((path for path in folders if checkpoint_step(path) <= current), key=checkpoint_step)
    stale = own[: max(0, len(own) - keep)]
    for folder in stale:
        shutil.rmtree(folder)
    return stale

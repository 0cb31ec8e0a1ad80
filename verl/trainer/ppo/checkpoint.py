"""Where checkpoints lie and which one is the newest.

Layout, as verl's::

    default_local_dir/
        latest_checkpointed_iteration.txt      step of the newest complete checkpoint
        global_step_N/actor/                   written by the training workers
        global_step_N/data.pt                  position in the training data

Reads and writes only this layout; model state is the workers' business.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from verl.trainer.config import TrainerConfig

LATEST = "latest_checkpointed_iteration.txt"
_STEP_FOLDER = re.compile(r"global_step_(\d+)$")


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
    latest = Path(config.default_local_dir) / LATEST
    if not latest.is_file():
        return None
    folder = step_folder(config.default_local_dir, int(latest.read_text().strip()))
    if not (folder / "actor").is_dir():
        raise ValueError(
            f"{latest} names {folder.name}, which holds no actor/; "
            "set trainer.resume_mode=resume_path and trainer.resume_from_path to a whole one, or resume_mode=disable"
        )
    return folder


def checkpoint_step(folder: Path) -> int:
    """Step number in the name of a checkpoint folder."""
    match = _STEP_FOLDER.search(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named global_step_N")
    return int(match.group(1))


def save_data_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep the position in the training data beside the model."""
    torch.save(state, folder / "data.pt")


def load_data_state(folder: Path) -> dict[str, Any] | None:
    """The saved data position, or None where the checkpoint has none."""
    path = folder / "data.pt"
    return torch.load(path, weights_only=False) if path.is_file() else None


def mark_latest(root: str | Path, step: int) -> None:
    """Declare a finished checkpoint the newest one."""
    path = Path(root) / LATEST
    beside = path.with_suffix(".tmp")
    beside.write_text(f"{step}\n")
    beside.replace(path)


def prune_checkpoints(root: str | Path, keep: int | None) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints (None: delete none); returns the deleted folders."""
    if keep is None:
        return []
    folders = sorted((p for p in Path(root).glob("global_step_*") if _STEP_FOLDER.search(p.name)), key=checkpoint_step)
    stale = folders[: max(0, len(folders) - keep)]
    for folder in stale:
        shutil.rmtree(folder)
    return stale

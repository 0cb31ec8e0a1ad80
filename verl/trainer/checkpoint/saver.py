"""Saves a run's checkpoints while it trains, one at a time.

::

    step N     save:  driver state, settings ─► .unfinished       ranks copy their state and write ──┐
    step N+1   poll:  still writing                                                                  │
    step N+2   poll:  all ranks are done ◄───────────────────────────────────────────────────────────┘
                      seal ─► publish ─► delete the oldest

``save`` waits where ``trainer.async_save=False``, and after the last step. If a save fails (a full disk, a folder that
cannot be written), the failure is logged and counted, the unfinished folder is removed and training goes on; only when
the last save of a run failed does the run end in an error.

Not here: what ranks write (``workers.fsdp.checkpoint``), where (``layout``), when (the trainer).
"""

import io
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from verl.config import PPOConfig
from verl.trainer.checkpoint import layout
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.utils.redaction import save_config

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """The last checkpoint of a run could not be written."""


class CheckpointSaver:
    """Writes the checkpoints of one run.

    Args:
        config: the run's settings; every checkpoint keeps a copy.
        identity: models and data of the run; see ``resume.run_identity``.
        best: learns of every checkpoint, and names those that must stay.
    """

    def __init__(self, config: PPOConfig, identity: dict[str, Any], best: BestCheckpoint) -> None:
        self._config, self._identity, self._best = config, identity, best
        self._root = Path(config.trainer.default_local_dir)
        self._pending: tuple[int, Any] | None = None
        """Step and worker group of the checkpoint that is being written."""
        self._failed_saves = 0
        self._last_failure = ""
        self.saved_any = False
        """Whether a checkpoint of this run is in place."""

    def save(self, ranks: Any, step: int, state: dict[str, Any], *, last: bool) -> dict[str, float]:
        """Begin the checkpoint of a step, after the one before it is written.

        Args:
            ranks: worker group of the student, with ``begin_checkpoint`` and ``checkpoint_outcome``.
            state: of the driver; its ``metrics`` are those of the step, and the count of failed saves joins them.
            last: wait for this one too, whatever ``trainer.async_save`` says.
        """
        began = time.perf_counter()
        metrics = self._finish_pending(wait=True)
        content = io.BytesIO()
        # To memory: on a full disk it would raise something else than OSError. With the count before this save.
        torch.save(state | {"metrics": state["metrics"] | self._failures()}, content)
        folder = layout.step_folder(self._root, step, layout.UNFINISHED)
        try:
            layout.remove_folder(folder)
            (folder / "actor").mkdir(parents=True)
            (folder / layout.DRIVER_STATE).write_bytes(content.getvalue())
            save_config(self._config, folder / "config.yaml")
        except OSError as error:
            self._record_failure(step, str(error))
        else:
            # Ranks need not share the driver's working folder.
            ranks.begin_checkpoint(str((folder / "actor").absolute()), step)
            self._pending = step, ranks
        if last or not self._config.trainer.async_save:
            metrics |= self._finish_pending(wait=True)
        return metrics | self._failures() | {"timing_s/save_checkpoint": time.perf_counter() - began}

    def poll(self) -> dict[str, float]:
        """Publish the checkpoint that is being written, if all ranks have finished."""
        return self._finish_pending(wait=False) | self._failures()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointError: the save that began last failed.
        """
        self._finish_pending(wait=True)
        if self._last_failure:
            raise CheckpointError(self._last_failure)

    def written_folders(self) -> dict[str, str]:
        """Where models of the run lie: its ``last_checkpoint`` and ``best_model``, as far as they are there."""
        if self._config.trainer.val_only or not self._config.trainer.saves_checkpoints:
            return {}
        folders = {"last_checkpoint": layout.newest_whole(self._root), "best_model": self._best.model_folder}
        return {name: str(folder.absolute()) for name, folder in folders.items() if folder is not None}

    def _failures(self) -> dict[str, float]:
        return {"training/failed_saves": float(self._failed_saves)} if self._config.trainer.saves_checkpoints else {}

    def _finish_pending(self, wait: bool) -> dict[str, float]:
        """Publish or give up the pending checkpoint once all ranks are done; empty if none is or they are not."""
        if self._pending is None:
            return {}
        began, (step, ranks) = time.perf_counter(), self._pending
        outcomes = ranks.checkpoint_outcome(wait)
        if not all(outcome.done for outcome in outcomes):
            return {}
        self._pending = None
        errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        config = self._config.trainer
        try:
            if errors:
                # An OSError too, so that a rank's failure and the driver's own end alike.
                raise OSError("; ".join(errors))
            unfinished = layout.step_folder(self._root, step, layout.UNFINISHED)
            layout.seal(unfinished, self._identity)
            layout.publish(self._root, step)
        except OSError as error:
            self._record_failure(step, str(error))
        else:
            self._last_failure, self.saved_any = "", True
            # Before pruning: the new best is protected and linked before an older checkpoint goes.
            self._best.checkpoint_ended(step, in_place=True)
            try:
                layout.prune_checkpoints(self._root, config.max_actor_ckpt_to_keep, step, self._best.protected)
            except OSError as error:
                logger.error(
                    "older checkpoints in trainer.default_local_dir=%s cannot be deleted: %s", self._root, error
                )
        waited_s, written_s = time.perf_counter() - began, max(outcome.seconds for outcome in outcomes)
        return {"timing_s/save_checkpoint": waited_s, "timing_s/save_checkpoint/write": written_s}

    def _record_failure(self, step: int, cause: str) -> None:
        """Log and count a failed save, and delete what was written of it."""
        self._best.checkpoint_ended(step, in_place=False)
        self._last_failure = f"step {step} could not be written to trainer.default_local_dir={self._root}: {cause}"
        self._failed_saves += 1
        logger.error("%s; training goes on, the next one is due as usual", self._last_failure)
        # This may fail for the same reason as the save; the next start clears what is left.
        shutil.rmtree(layout.step_folder(self._root, step, layout.UNFINISHED), ignore_errors=True)

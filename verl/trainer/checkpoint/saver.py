"""Saves a run's checkpoints: one at a time, beside the training, and never in the way of it.

::

    step N     save:  data position, settings ─► .unfinished      ranks copy their state and write ──┐
    step N+1   poll:  still writing                                                                  │
    step N+2   poll:  all ranks are done ◄───────────────────────────────────────────────────────────┘
                      seal ─► put into place ─► delete the oldest

With ``trainer.async_save=False``, and after the last step, ``save`` waits. A save that fails (a full disk, a folder
that cannot be written) costs that checkpoint and nothing else: it is said and counted, what was written of it is
removed, and the run goes on; only where the last save of a run failed does the run end in an error.

Not here: what ranks write (``workers.fsdp.checkpoint``), where (``checkpoint``), when (the trainer).
"""

import logging
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from verl.config import PPOConfig
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.manifest import seal
from verl.utils.save_outcome import SaveOutcome
from verl.utils.saved_config import save_config
from verl.utils.timing import marked_timer

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class CheckpointError(RuntimeError):
    """The last checkpoint of a run could not be written."""


class SavingRanks(Protocol):
    """The worker group of the trained model, as far as saving needs it."""

    def begin_checkpoint(self, local_path: str, global_step: int) -> Any:
        """Copy the state and start to write it."""

    def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
        """How far every rank is."""


class _Pending(NamedTuple):
    """A checkpoint that the ranks are writing."""

    step: int
    ranks: SavingRanks


class CheckpointSaver:
    """Writes the checkpoints of one run.

    Args:
        config: the run's settings, which every checkpoint keeps.
        facts: what the run trains on; see ``resume_check.run_facts``.
        best: is told of every checkpoint, and names those that must stay; None: one of its own.
    """

    def __init__(self, config: PPOConfig, facts: dict[str, Any], best: BestCheckpoint | None = None) -> None:
        self._config = config
        self._facts = facts
        self._best = BestCheckpoint(config.trainer) if best is None else best
        self._root = Path(config.trainer.default_local_dir)
        self._pending: _Pending | None = None
        self._failed_saves = 0
        self._last_failure = ""
        self.saved_any = False
        """Whether a checkpoint of this run is in place."""

    def save(self, ranks: SavingRanks, step: int, state: checkpoint.DataState, *, last: bool) -> Metrics:
        """Begin the checkpoint of a step, once the one before it is written.

        Args:
            last: wait for this one too, whatever ``trainer.async_save`` says.
        """
        timing: dict[str, float] = {}
        with marked_timer("save_checkpoint", timing):
            metrics = self._settle(wait=True)
            # Right wherever it is read: a checkpoint that can be resumed from did not fail.
            self._begin(ranks, step, replace(state, figures=state.figures | self._figures({})))
            if last or not self._config.trainer.async_save:
                metrics |= self._settle(wait=True)
        return metrics | self._figures(timing)

    def poll(self) -> Metrics:
        """Put the checkpoint that is being written into place if it is finished."""
        timing: dict[str, float] = {}
        with marked_timer("save_checkpoint", timing):
            metrics = self._settle(wait=False)
        return metrics | self._figures(timing if metrics else {})

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointError: the last one that was begun could not be written.
        """
        self._settle(wait=True)
        if self._last_failure:
            raise CheckpointError(self._last_failure)

    def latest_checkpoint_text(self) -> str:
        """The newest checkpoint that could be resumed from now, in words."""
        safe = checkpoint.newest_whole(self._root)
        return f"{safe} is whole and safe" if safe else "there is no whole checkpoint yet"

    def _figures(self, timing: dict[str, float]) -> Metrics:
        if not self._config.trainer.saves_checkpoints:
            return {}
        figures: Metrics = {"training/failed_saves": float(self._failed_saves)}
        return figures | {f"timing_s/{name}": seconds for name, seconds in timing.items()}

    def _begin(self, ranks: SavingRanks, step: int, state: checkpoint.DataState) -> None:
        folder = checkpoint.unfinished_folder(self._root, step)
        try:
            if folder.exists():
                shutil.rmtree(folder)
            (folder / "actor").mkdir(parents=True)
            checkpoint.save_data_state(folder, state)
            save_config(self._config, folder / "config.yaml")
        except OSError as error:
            self._note_failure(step, str(error))
            return
        ranks.begin_checkpoint(str((folder / "actor").absolute()), step)
        self._pending = _Pending(step, ranks)

    def _settle(self, wait: bool) -> Metrics:
        """Deal with the checkpoint that is being written, if there is one and it is finished."""
        if self._pending is None:
            return {}
        step, ranks = self._pending
        outcomes = ranks.checkpoint_outcome(wait)
        if not all(outcome.done for outcome in outcomes):
            return {}
        self._pending = None
        errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if errors:
            self._note_failure(step, "; ".join(errors))
        else:
            self._put_into_place(step)
        return {"timing_s/save_checkpoint/write": max(outcome.seconds for outcome in outcomes)}

    def _put_into_place(self, step: int) -> None:
        trainer = self._config.trainer
        try:
            seal(checkpoint.unfinished_folder(self._root, step), step, trainer.world_size, self._facts)
            checkpoint.publish(self._root, step)
        except OSError as error:
            self._note_failure(step, str(error))
            return
        self._last_failure = ""
        self._best.checkpoint_ended(step, in_place=True)
        self.saved_any = True
        try:
            keep = trainer.max_actor_ckpt_to_keep
            checkpoint.prune_checkpoints(self._root, keep, current=step, protected=self._best.protected)
        except OSError as error:
            logger.error("older checkpoints in trainer.default_local_dir=%s cannot be deleted: %s", self._root, error)

    def _note_failure(self, step: int, cause: str) -> None:
        """Say what failed and what is safe, count it, and free the room it took."""
        self._best.checkpoint_ended(step, in_place=False)
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(self._root).free / 2**30:.2f} GiB free)"
        self._last_failure = (
            f"the checkpoint of step {step} could not be written to trainer.default_local_dir={self._root}{free}: "
            f"{cause}; {self.latest_checkpoint_text()}"
        )
        self._failed_saves += 1
        logger.error("%s; training goes on, the next one is due as usual", self._last_failure)
        shutil.rmtree(checkpoint.unfinished_folder(self._root, step), ignore_errors=True)

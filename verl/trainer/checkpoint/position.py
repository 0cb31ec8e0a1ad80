"""Where a run stands, beside its model: what a checkpoint keeps of the driver.

::

    save     prompts, KL weight, canary, the step's figures ─► DataState ─► data.pt
    resume   data.pt ─► the same, but for the figures, which the log gets where it lacks them

A step's figures are logged behind its checkpoint, whose seconds belong to them; a run that is killed between the two
finds them here.

Not here: where checkpoints lie and how they are written (``checkpoint``, ``checkpoint_saver``).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.config import TrainerConfig
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.ppo.core_algos import KLController
from verl.trainer.ppo.teacher_probe import TeacherProbe
from verl.trainer.prompt_stream import PromptStream
from verl.utils.tracking import Tracking, as_numbers

START_AFRESH = "trainer.resume_mode=disable or another default_local_dir starts afresh"
"""How not to go on from a checkpoint, for messages."""


class RunPosition:
    """The driver's part of checkpoints.

    Args:
        config: where checkpoints lie, and what may differ in them.
        prompts: gives the position in the training data, and takes it.
        kl_controller: its weight may have moved.
        canary: what the teachers scored.
    """

    def __init__(
        self, config: TrainerConfig, prompts: PromptStream, kl_controller: KLController, canary: TeacherProbe
    ) -> None:
        self._config = config
        self._prompts, self._kl_controller, self._canary = prompts, kl_controller, canary

    def state(self, figures: Mapping[str, Any]) -> checkpoint.DataState:
        """What the checkpoint of a step keeps, right behind the step.

        Args:
            figures: of the step, to which the saver adds its own.
        """
        state = self._prompts.state(self._kl_controller.value)
        return replace(state, canary=self._canary.state(), figures=as_numbers(figures))

    def resume(self, log: Tracking, best: BestCheckpoint) -> Path | None:
        """Take the position of the checkpoint that ``trainer.resume_mode`` names, and have the records go on there.

        Args:
            log, best: what they hold of later steps is void; a run that only validates leaves them as they are.

        Returns:
            The checkpoint; None where there is none, and the run starts afresh.

        Raises:
            ValueError: it belongs to other data.
            GuardError: a teacher scores otherwise than in that run.
        """
        folder, step, figures = checkpoint.find_checkpoint(self._config), None, None
        if folder is not None:
            step, figures = checkpoint.checkpoint_step(folder), self._take(folder)
        if not self._config.val_only:
            log.truncate_after(step, figures)
            best.truncate_after(step)
        return folder

    def _take(self, folder: Path) -> dict[str, float] | None:
        """Take the position; the step's figures, or None where they are another run's or were not kept."""
        may_differ = any(key.split(".")[0] == "data" for key in self._config.resume_allow_changed)
        state = checkpoint.load_data_state(folder, self._prompts.fresh_state(), may_differ=may_differ)
        self._canary.load_state(state.canary, checkpoint.checkpoint_step(folder))
        self._prompts.load_state(state)
        self._kl_controller.value = state.kl_coef
        is_own = folder.resolve().parent == Path(self._config.default_local_dir).resolve()
        return state.figures or None if is_own else None

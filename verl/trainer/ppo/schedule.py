"""When a run validates, saves and ends.

In: the run's settings, the step it is at, and what is known of its best step. Out: yes or no. Does none of it.
"""

from verl.config import TrainerConfig
from verl.trainer.checkpoint.best import BestCheckpoint


class Schedule:
    """The steps that have something behind them.

    Args:
        config: how often what is done.
        total_steps: steps of the whole run; may be lowered while it goes on.
        best: knows whether a step is the best so far, and whether it is time to give up.
    """

    def __init__(self, config: TrainerConfig, total_steps: int, best: BestCheckpoint) -> None:
        self._config, self._best = config, best
        self.total_steps = total_steps

    def validates(self, step: int) -> bool:
        """Whether a validation is due behind a step."""
        return self._is_due(self._config.test_freq, step)

    def ends(self, step: int, is_stopped: bool) -> bool:
        """Whether a step is the last: all are taken, the run is told to stop, or it has not got better for long."""
        return step >= self.total_steps or is_stopped or self._best.gives_up()

    def saves(self, step: int, is_last: bool) -> bool:
        """Whether a step leaves a checkpoint: one is due, it is the last of a run that saves, or the best so far."""
        due = self._is_due(self._config.save_freq, step) or (is_last and self._config.save_freq > 0)
        return due or self._best.is_new(step)

    def _is_due(self, every: int, step: int) -> bool:
        """Every so many steps, and after the last; never where ``every`` < 1."""
        return every > 0 and (step % every == 0 or step >= self.total_steps)

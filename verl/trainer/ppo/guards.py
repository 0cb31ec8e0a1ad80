"""Watches that end a run, or speak up, when its figures show that something broke.

In:  the figures of a step. Out: figures of their own, a warning, or a `GuardError` that says what is safe.

- `SkippedUpdates` ends a run whose updates are not finite, step after step.
- `EngineGap` warns where the engine samples from something else than the trainer trains.
- ``teacher_canary`` ends a run whose teacher no longer scores as it did.

Not here: the skipping itself (``workers.fsdp.optimizer``), and timeouts.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from verl.config import PPOConfig
from verl.trainer.checkpoint.saver import CheckpointError, CheckpointSaver

logger = logging.getLogger(__name__)

Metrics = dict[str, float]

UPDATES, SKIPPED = "actor/updates", "actor/skipped_updates"
SAMPLER_GAP, LARGEST_GAP = "training/rollout_log_probs_diff_mean", "training/rollout_log_probs_diff_max"
RECOVERY_RATIO = 10
"""Updates that make up for a skipped one."""
WORSE = 2.0
"""A gap that grew by this factor is said again."""


class GuardError(RuntimeError):
    """The run was ended before it did harm."""


def end_run(cause: str, saver: CheckpointSaver) -> NoReturn:
    """End the run with its cause and what is safe, once the checkpoint that is being written is in place.

    Raises:
        GuardError: always.
    """
    with suppress(CheckpointError):  # the saver has said so; the cause here is another
        saver.finish()
    raise GuardError(f"{cause}. {saver.latest_checkpoint_text()}")


class SkippedUpdates:
    """Ends a run that cannot update its model.

    A skipped update counts one, and ten that are taken make up for one: a bad row now and then over days never ends a
    run, whereas one that loses more than one update in eleven ends, and one that takes none does so at once. The count
    is the driver's, so it outlives workers; a resumed run starts at none, for it trains again what it was skipped on.

    Args:
        config: ``trainer.max_skipped_updates``.
        saver: knows what is safe.
    """

    def __init__(self, config: PPOConfig, saver: CheckpointSaver) -> None:
        self._limit = config.trainer.max_skipped_updates
        self._saver = saver
        self._excess_skips = 0
        """Updates that are missing to make up for the skipped ones."""
        self._total = 0
        self._last_taken: int | None = None

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at the figures of a step, as ``update_actor`` gives them; a trainer without these counts is not watched.

        Raises:
            GuardError: more updates were skipped than may be.
        """
        if UPDATES not in metrics or SKIPPED not in metrics:
            return
        taken, skipped = int(metrics[UPDATES]), int(metrics[SKIPPED])
        self._excess_skips = max(0, self._excess_skips - taken) + RECOVERY_RATIO * skipped
        self._last_taken = step if taken else self._last_taken
        if not skipped:
            return
        before, self._total = self._total, self._total + skipped
        broken = [f"{name}={value}" for name, value in metrics.items() if _is_broken(name, value)]
        said = (
            f"{skipped} of the {taken + skipped} updates of step {step} had a loss or gradient that is not finite and "
            f"changed nothing ({', '.join(broken)}); {self._total} of this run so far"
        )
        if self._limit is not None and self._excess_skips > RECOVERY_RATIO * self._limit:
            last = "no update was taken before" if self._last_taken is None else f"step {self._last_taken} took one"
            end_run(
                f"{said}, which is more than trainer.max_skipped_updates={self._limit} allows; the last that changed "
                f"the weights: {last}. Look at the figures before it in metrics.jsonl and at the data of this step; a "
                "lower actor_rollout_ref.actor.optim.lr, bounds on the advantage (algorithm.distill_adv_min_clip, "
                "distill_adv_max_clip) or an older checkpoint (trainer.resume_mode=resume_path) may help, and null "
                "sets no limit",
                self._saver,
            )
        if self._total.bit_length() > before.bit_length():  # at 1, 2, 4, 8, ... rather than every time
            logger.warning("%s", said)


def _is_broken(name: str, value: float) -> bool:
    return name.startswith("actor/") and not math.isfinite(value)


class EngineGap:
    """Measures how far the engine's log-probs are from the trainer's, and says where that is too far.

    - ``distill/engine_gap``: mean |difference| at trained tokens, nats. The same number as
      ``training/rollout_log_probs_diff_mean``, which is there for any sampler; this one only where the sampler is the
      policy (top_p=1, top_k=-1), so that anything beyond rounding is a fault: stale or wrong weights, another
      temperature, another vocabulary.
    - ``distill/engine_gap_exceeded``: 1 in a step whose gap is beyond ``trainer.engine_gap_bound``, else 0.

    Needs ``rollout.calculate_log_probs``.
    """

    def __init__(self, config: PPOConfig) -> None:
        rollout = config.actor_rollout_ref.rollout
        self._is_defined = rollout.top_p == 1 and rollout.top_k == -1
        self._bound = config.trainer.engine_gap_bound
        self._said = 0.0
        self._exceeded = 0

    def watch(self, metrics: Mapping[str, float], step: int) -> Metrics:
        """The gap of a step, from the figures of its batch; a warning the first time that it is too large, and
        whenever it has doubled since the last one.
        """
        if not self._is_defined or SAMPLER_GAP not in metrics:
            return {}
        gap = metrics[SAMPLER_GAP]
        if self._bound is None:
            return {"distill/engine_gap": gap}
        exceeds = not gap <= self._bound  # NaN does
        self._exceeded += exceeds
        size = gap if math.isfinite(gap) else math.inf
        if exceeds and size > WORSE * self._said:
            self._said = size
            logger.warning(
                "step %d: the engine's log-probs of its own tokens differ from the trainer's by %.4g nats on average "
                "(at most %.4g), above trainer.engine_gap_bound=%s; so far in %d steps. It samples from other weights "
                "or rounds otherwise: compare the precision of both (rollout.dtype), and look whether "
                "distill/engine_gap rises from step to step",
                step,
                gap,
                metrics[LARGEST_GAP],
                self._bound,
                self._exceeded,
            )
        return {"distill/engine_gap": gap, "distill/engine_gap_exceeded": float(exceeds)}

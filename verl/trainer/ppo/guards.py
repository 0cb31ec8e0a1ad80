"""Guards that end a run, or warn, when its metrics show that something broke.

- `SkippedUpdates` ends a run whose updates are not finite, step after step.
- `EngineGap` warns where the engine samples from something else than the trainer trains.
- `TeacherProbe` ends a run whose teacher no longer scores as it did.

In: the metrics of a step, or the teachers' worker groups. Out: metrics, a warning, or a `GuardError`.
Not here: the skipping itself (``workers.actor.dp_actor``), and timeouts.

Letters: N rows, T tokens of a row.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.trainer.checkpoint.resume import matches
from verl.trainer.checkpoint.saver import CheckpointError, CheckpointSaver
from verl.trainer.ppo.metric_utils import Metrics

logger = logging.getLogger(__name__)


RECOVERY_RATIO = 10
"""Updates that make up for a skipped one."""
PROBE_TOKENS = 128
NO_EFFECT_ON_SCORES = ("data", "actor_rollout_ref.rollout.val_kwargs")
"""Settings that decide nothing about how a teacher scores."""
GOLDEN_RATIO = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval evenly however many there are."""


class GuardError(RuntimeError):
    """The run was ended before it did harm."""


def end_run(cause: str, saver: CheckpointSaver) -> NoReturn:
    """Finish the checkpoint that is being written, then raise GuardError."""
    with suppress(CheckpointError):  # logged by the saver; the cause here is another
        saver.finish()
    raise GuardError(cause)


class SkippedUpdates:
    """Ends a run that skips more updates than ``trainer.max_skipped_updates`` allows.

    A skipped update counts one, and ten taken updates make up for one: a bad row now and then never ends a run, one
    that loses more than one update in eleven ends, and one that takes none ends soon. The count lives in the driver, so
    it outlives workers; a resumed run starts at 0, for it repeats the steps that skipped.
    """

    def __init__(self, config: PPOConfig, saver: CheckpointSaver) -> None:
        self._limit, self._saver = config.trainer.max_skipped_updates, saver
        self._excess_skips = 0
        """Taken updates that are missing to make up for the skipped ones."""
        self._total = 0

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Count the updates of a step, as ``update_actor`` reports them; a trainer that reports none is not checked.

        Raises:
            GuardError: too many updates were skipped.
        """
        taken, skipped = int(metrics.get("actor/updates", 0)), int(metrics.get("actor/skipped_updates", 0))
        # In this order: updates of this step make up for earlier skips, not for those beside them.
        self._excess_skips = max(0, self._excess_skips - taken) + RECOVERY_RATIO * skipped
        if not skipped:
            return
        self._total += skipped
        broken = [f"{k}={v}" for k, v in metrics.items() if k.startswith("actor/") and not math.isfinite(v)]
        message = (
            f"{skipped} of the {taken + skipped} updates of step {step} had a loss or gradient that is not finite and "
            f"changed nothing ({', '.join(broken)}); {self._total} of this run so far"
        )
        if self._limit is not None and self._excess_skips > RECOVERY_RATIO * self._limit:
            end_run(
                f"{message}, more than trainer.max_skipped_updates={self._limit} allows: look at metrics.jsonl and the "
                "data of this step, lower actor_rollout_ref.actor.optim.lr, or set algorithm.distill_adv_min_clip",
                self._saver,
            )
        if self._total.bit_length() > (self._total - skipped).bit_length():  # at 1, 2, 4, 8 ... of them
            logger.warning("%s", message)


class EngineGap:
    """Compares the engine's log-probs with the trainer's.

    - ``distill/engine_gap``: mean |difference| at trained tokens, nats. The same number as
      ``training/rollout_log_probs_diff_mean``, but only where the sampler is the policy (top_p=1, top_k=-1) and has
      the same weights (max_staleness=0, nothing carried on), so that anything beyond rounding is a fault: stale or
      wrong weights, another temperature, another vocabulary.
    - ``distill/engine_gap_exceeded``: 1 in a step whose gap is beyond ``trainer.engine_gap_bound``, else 0; the first
      such step is warned of, and each that doubles the gap of the last warning.

    Needs ``rollout.calculate_log_probs``.
    """

    def __init__(self, config: PPOConfig) -> None:
        rollout = config.actor_rollout_ref.rollout
        is_policy = rollout.top_p == 1 and rollout.top_k == -1
        self._is_defined = is_policy and not config.trainer.max_staleness and not rollout.carries
        self._bound = config.trainer.engine_gap_bound
        self._warned_of = 0.0
        """Gap of the last warning."""

    def check(self, metrics: Mapping[str, float], step: int) -> Metrics:
        """The gap of a step; warns if it is too large or NaN."""
        gap = metrics.get("training/rollout_log_probs_diff_mean")
        if not self._is_defined or gap is None:
            return {}
        if self._bound is None:
            return {"distill/engine_gap": gap}
        exceeds = not gap <= self._bound  # true for NaN
        size = math.inf if math.isnan(gap) else gap
        if exceeds and size >= 2 * self._warned_of and size != self._warned_of:
            self._warned_of = size
            logger.warning(
                "step %d: the engine's log-probs of its own tokens differ from the trainer's by %.4g nats on average, "
                "above trainer.engine_gap_bound=%s: it samples from other weights or rounds otherwise (rollout.dtype)",
                *(step, gap, self._bound),
            )
        return {"distill/engine_gap": gap, "distill/engine_gap_exceeded": float(exceeds)}


class TeacherProbe:
    """Ends a run whose teacher scores a fixed row of tokens otherwise than at the run's first start.

    ::

        start            score ─► the reference, if the run is new  ┐
        each checkpoint  score ─────────────────────────────────────┴► largest |difference| from the reference ─► metric

    The tokens are spread over the ids that the teacher knows, item tokens included if it knows them. Every rank scores
    the same row, so that a rank that computes something else is found as well. Checkpoints carry the reference (some
    hundred numbers a teacher), so a teacher that another machine loads otherwise is found before anything is trained
    on it. Where a difference is too large, nothing is saved. One that follows the student (``ema``) is not probed.

    Args:
        config: ``trainer.canary_tolerance``, and the settings that decide how teachers score.
        vocab_size: ids of the student's tokenizer.
        saver: finishes the checkpoint that is being written before the run is ended.
    """

    def __init__(self, config: PPOConfig, vocab_size: int, saver: CheckpointSaver) -> None:
        trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
        self._tolerance, self._saver = trainer.canary_tolerance, saver
        self._may_change = any(not matches(NO_EFFECT_ON_SCORES, key) for key in trainer.resume_allow_changed)
        self._knows_extended, self._vocab_size = config.knows_extended, vocab_size
        self._extend_start = vocab_size if rollout.extend_start is None else min(vocab_size, rollout.extend_start)
        # No longer than a training row, which limits of micro-batches and positions were chosen for.
        self._count = min(PROBE_TOKENS, rollout.prompt_length + rollout.response_length)
        self._temperature = rollout.temperature
        self._moving = {name for name, teacher in config.algorithm.distill.teachers.items() if teacher.ema is not None}
        # A row for every rank of any group, since rows are split over the ranks.
        self._rows = max(trainer.world_size, sum(trainer.teacher_ranks_on_nodes))
        self._reference: dict[str, list[float]] = {}
        """Log-probs by teacher."""

    def check(self, teachers: Mapping[str, Any], step: int) -> Metrics:
        """Have every teacher score its tokens; the first scores of a teacher are its reference.

        Args:
            teachers: worker groups by role.

        Returns:
            ``distill/teacher_canary`` of ``ref``, ``distill_teacher/<role>/teacher_canary`` of further teachers: the
            largest |difference| of a log-prob from the reference, nats. Empty if ``trainer.canary_tolerance`` is null.

        Raises:
            GuardError: a difference is above the tolerance.
        """
        if self._tolerance is None:
            return {}
        metrics: Metrics = {}
        for role, teacher in ((role, group) for role, group in teachers.items() if role not in self._moving):
            scores = teacher.compute_ref_log_prob(self._batch(role)).tensor("ref_log_prob").float()
            expected = torch.tensor(self._reference.setdefault(role, scores[0].tolist()))
            # The score of an id that the teacher lacks is a setting, which may be minus infinity on both sides.
            difference = float((scores - expected).abs().masked_fill(scores == expected, 0.0).max())
            if not difference <= self._tolerance:  # NaN is not
                end_run(
                    f"teacher {role!r} at step {step} scores otherwise than at the run's first start: the "
                    f"{len(expected)} log-probs of its probe differ by up to {difference:.4g} nats on some rank, above "
                    f"trainer.canary_tolerance={self._tolerance}; the same command loads it anew; if it is "
                    "meant to be another, raise the tolerance or set trainer.resume_allow_changed=[teacher]",
                    self._saver,
                )
            metrics["distill/teacher_canary" if role == "ref" else f"distill_teacher/{role}/teacher_canary"] = (
                difference
            )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Tokens and reference of every teacher, for a checkpoint."""
        return {role: {"tokens": self._tokens(role), "log_probs": scores} for role, scores in self._reference.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the reference of the run's first start.

        A teacher whose reference is missing or of other tokens gets one at this start, and so do all where
        ``resume_allow_changed`` names what may change how they score.
        """
        for role, saved in state.items():
            if self._may_change or saved["tokens"] != self._tokens(role):
                logger.warning("teacher %r is not compared with the run's first start; its probe starts over", role)
            else:
                self._reference[role] = saved["log_probs"]

    def _tokens(self, role: str) -> list[int]:
        """Ids spread over those that a teacher knows, in an order that jumps; always the same ones."""
        known_ids = self._vocab_size if self._knows_extended(role) else self._extend_start
        return [int(place * GOLDEN_RATIO % 1.0 * known_ids) for place in range(self._count)]

    def _batch(self, role: str) -> DataProto:
        """N equal rows of one prompt token and T - 1 response tokens, with the keys that scoring reads."""
        row = torch.tensor([self._tokens(role)]).expand(self._rows, -1).clone()
        tensors = {"input_ids": row, "responses": row[:, 1:].clone(), "attention_mask": torch.ones_like(row)}
        return DataProto.from_dict(tensors, meta_info={"temperature": self._temperature})

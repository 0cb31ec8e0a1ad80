"""A fixed row of tokens that shows whether a teacher's weights are still what they were.

::

    start            score ─► reference ◄── the checkpoint's, where the run resumes
    each checkpoint  score ─► |difference| from the reference ─► figure; too large: the run ends, nothing is saved

The tokens are spread over the ids that the teacher knows, so they depend on the vocabulary alone: item tokens are
among them where it reads and judges them. Every rank scores the same row, and each is held to the reference: a rank
that computes something else is found as well. The reference is that of the run's first start. Checkpoints carry it
(some hundred numbers a teacher), so a teacher that goes wrong between two starts, or that another machine loads
otherwise, is found before anything is trained on it.

Not here: how a teacher scores (``workers.teacher_worker``).

Letters: N rows, T tokens of a row.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.trainer.checkpoint.resume_check import covers
from verl.trainer.checkpoint.saver import CheckpointSaver
from verl.trainer.ppo.guards import Metrics, end_run

logger = logging.getLogger(__name__)

CANARY_TOKENS = 128
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval evenly however many there are."""
CHANGES_NO_TEACHER = ("data", "actor_rollout_ref.rollout.val_kwargs")
"""Settings that may differ on resume without touching a teacher."""


class ScoringRanks(Protocol):
    """The worker group of a teacher, as far as it is needed here."""

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` of the responses."""


def canary_tokens(known_ids: int, count: int) -> list[int]:
    """``count`` ids spread over those from 0 to ``known_ids`` - 1, in an order that jumps; always the same ones."""
    return [int(place * GOLDEN % 1.0 * known_ids) for place in range(count)]


class TeacherProbe:
    """Holds every teacher to what it scored at the start.

    Args:
        config: ``trainer.canary_tolerance`` and what decides how the teachers score.
        vocab_size: ids of the student's tokenizer.
        saver: knows what is safe.
    """

    def __init__(self, config: PPOConfig, vocab_size: int, saver: CheckpointSaver) -> None:
        trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
        self._tolerance = trainer.canary_tolerance
        self._saver = saver
        self._distill, self._vocab_size = config.algorithm.distill, vocab_size
        self._extend_start = vocab_size if rollout.extend_start is None else min(vocab_size, rollout.extend_start)
        # No longer than a training row: limits of micro-batches and positions were chosen for those.
        self._count = min(CANARY_TOKENS, rollout.prompt_length + rollout.response_length)
        self._temperature = rollout.temperature
        self._rows = max(trainer.world_size, sum(trainer.teacher_ranks_on_nodes))
        self._may_start_over = not all(covers(CHANGES_NO_TEACHER, key) for key in trainer.resume_allow_changed)
        self._reference: dict[str, list[float]] = {}
        self._right_at: int | None = None

    def check(self, teachers: Mapping[str, ScoringRanks], step: int) -> Metrics:
        """Score the canary by every teacher.

        Args:
            teachers: by role; one that is met for the first time gives its reference.

        Returns:
            ``distill/teacher_canary`` of ``ref``, ``distill_teacher/<role>/teacher_canary`` of further teachers: the
            largest |difference| of a log-prob from the reference, nats. Nothing where the canary is off.

        Raises:
            GuardError: a teacher scores otherwise than at the start.
        """
        if self._tolerance is None:
            return {}
        metrics: Metrics = {}
        for role, teacher in teachers.items():
            scores = teacher.compute_ref_log_prob(self._batch(role)).tensor("ref_log_prob")
            self._reference.setdefault(role, scores[0].tolist())
            difference = _difference(scores, self._reference[role])
            if not difference <= self._tolerance:  # NaN is not
                self._end(role, difference, step)
            family = "distill" if role == "ref" else f"distill_teacher/{role}"
            metrics[f"{family}/teacher_canary"] = difference
        self._right_at = step
        return metrics

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: each teacher's tokens and what it scored; None where the canary is off."""
        if self._tolerance is None:
            return None
        teachers = {
            role: {"tokens": self._tokens(role), "log_probs": log_probs} for role, log_probs in self._reference.items()
        }
        return {"temperature": self._temperature, "teachers": teachers}

    def load_state(self, state: dict[str, Any] | None, step: int) -> None:
        """Hold the teachers, which were scored at this start, to the reference of the run's first start.

        Where the checkpoint has none for a teacher, or one of other tokens, this start's reference stays; likewise for
        all of them where ``resume_allow_changed`` lets differ what may touch a teacher.

        Raises:
            GuardError: a teacher scores otherwise than it did there.
        """
        if self._tolerance is None or state is None:
            return
        comparable = not self._may_start_over and state["temperature"] == self._temperature
        known = state.get("teachers", {}) if comparable else {}  # checkpoints of before had one row for all
        self._right_at = step
        for role, scores in self._reference.items():
            if role not in known or known[role]["tokens"] != self._tokens(role):
                logger.warning("the checkpoint cannot say whether teacher %r is the same: the canary starts over", role)
                continue
            self._reference[role] = known[role]["log_probs"]
            difference = _difference(torch.tensor(scores), self._reference[role])
            if not difference <= self._tolerance:
                end_run(
                    f"teacher {role!r} scores otherwise than in the run that is to be resumed at step {step}: the "
                    f"{len(scores)} log-probs of its canary differ by up to {difference:.4g} nats, above "
                    f"trainer.canary_tolerance={self._tolerance}. Its weights are others or were loaded wrong; where "
                    "only GPU, precision or attention changed, raise the tolerance, and "
                    "trainer.resume_allow_changed=[teacher] starts the canary over",
                    self._saver,
                )
            logger.info("canary of teacher %r: %.4g nats from the run's first start", role, difference)

    def _tokens(self, role: str) -> list[int]:
        """The tokens of a teacher: over all of the student's ids where it knows them, else over the shared ones."""
        return canary_tokens(
            self._vocab_size if self._distill.knows_extended(role) else self._extend_start, self._count
        )

    def _batch(self, role: str) -> DataProto:
        """N equal rows of one prompt token and T - 1 response tokens, with the keys that scoring reads."""
        row = torch.tensor([self._tokens(role)]).expand(self._rows, -1).clone()
        responses = row[:, 1:].clone()
        tensors = {
            "input_ids": row,
            "responses": responses,
            "attention_mask": torch.ones_like(row),
            "distill_special_token_mask": (responses >= self._extend_start).long(),
        }
        return DataProto.from_dict(tensors, meta_info={"temperature": self._temperature})

    def _end(self, role: str, difference: float, step: int) -> None:
        above = f"{difference:.4g} nats, above trainer.canary_tolerance={self._tolerance}"
        if self._right_at is None:
            cause = (
                f"teacher {role!r} is broken from the start: the log-probs of its canary are not finite, or differ "
                f"from rank to rank, by {above}; check the files of its model"
            )
        else:
            cause = (
                f"teacher {role!r} at step {step} scores otherwise than at the run's start: the "
                f"{self._count - 1} log-probs of its canary differ by up to {above}. Its weights went wrong "
                f"(memory, offload, a bug) after step {self._right_at}, where they were right; what was learned since "
                "is not saved. The same command again loads the teacher anew and goes on from the newest checkpoint"
            )
        end_run(cause, self._saver)


def _difference(scores: torch.Tensor, reference: list[float]) -> float:
    """Largest |difference|; NaN where a score is NaN."""
    expected = torch.tensor(reference)
    # What a teacher says of an id it lacks is a setting, which may be minus infinity.
    return float((scores.float() - expected).abs().masked_fill(scores == expected, 0.0).max())

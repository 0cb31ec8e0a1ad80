"""The loss of one mini-batch that learns from a task reward and from whole distributions of a teacher.

    loss = policy loss of the task's advantages + coef x mean of (D(student, teacher) + leak term)

In and out as in ``mini_batch_loss`` and ``exact_distill``, whose losses these are: one forward pass of the student
gives what both need, and one backward pass takes the gradient of their sum.
"""

from typing import Any

import torch

from verl.ops.linear_divergence import DivergenceStats
from verl.ops.linear_log_prob import TokenStats
from verl.workers.actor.exact_distill import ExactDistillLoss
from verl.workers.actor.mini_batch_loss import MiniBatchLoss
from verl.workers.actor.row_layout import MicroBatch
from verl.workers.fsdp.token_stats_model import Head


class TaskAndDistillLoss:
    """The sum of two losses of the same rows.

    Args:
        task: the policy loss, with its entropy and KL terms where they are on.
        distill: the divergence from the teachers.
        coef: weight of the second.
    """

    def __init__(self, task: MiniBatchLoss, distill: ExactDistillLoss, coef: float) -> None:
        self._task, self._distill, self._coef = task, distill, coef
        self.trained = task.trained
        """(M, R) positions that are scored and trained, on the CPU."""
        self.is_empty = task.is_empty
        """Whether no rank has a trained token in this mini-batch."""

    def head(self, micro: MicroBatch) -> "_Both":
        """What the student's head has to compute; runs the teachers' forward passes."""
        return _Both(self._task.head(micro), self._distill.head(micro))

    def __call__(
        self, micro: MicroBatch, result: tuple[TokenStats, tuple[torch.Tensor, DivergenceStats]]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch and its metrics; ``actor/distill_loss`` stands before ``coef``."""
        task, metrics = self._task(micro, result[0])
        distill, more = self._distill(micro, result[1])
        return task + self._coef * distill, metrics | more


class _Both:
    """A head that computes what two of them do; a plain class, for the reason that the divergence's head is one."""

    def __init__(self, task: Head, distill: Head) -> None:
        self._task, self._distill = task, distill

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        return self._task(hidden, weight, labels), self._distill(hidden, weight, labels)

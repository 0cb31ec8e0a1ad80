"""On-policy distillation as a trainer: the reference is a teacher, and its disagreement is the advantage.

No task reward, always a teacher, and figures of its own in training and validation. The clipped reverse KL itself is an
advantage estimator in ``core_algos``; the loop is the base class's.
"""

import logging

from verl.protocol import DataProto
from verl.trainer.ppo.metric_utils import (
    compute_on_policy_distill_data_metrics,
    compute_validation_distill_metrics,
)
from verl.trainer.ppo.ray_trainer import Metrics, RayPPOTrainer

logger = logging.getLogger(__name__)


class RayOnPolicyDistillTrainer(RayPPOTrainer):
    """The student answers, the teacher scores every token it knows, the student follows the reverse KL."""

    @property
    def uses_reference(self) -> bool:
        """The teacher is what this trainer learns from."""
        return True

    @property
    def uses_reward(self) -> bool:
        """No task reward; a reward function, where given, is used by validation alone."""
        return False

    def step_metrics(self, batch: DataProto) -> Metrics:
        """The base figures and the ``distill/*`` family, overall and per data source."""
        return super().step_metrics(batch) | compute_on_policy_distill_data_metrics(batch, self.config.algorithm)

    def score_validation(self, batch: DataProto) -> DataProto:
        """Log-probs of student and teacher for the held-out reverse KL; rewards where there is a function."""
        scores = super().score_validation(batch)
        if self.samples_validation:
            scores = scores.union(self.old_log_prob(batch)).union(self.ref_log_prob(batch))
        return scores

    def validation_metrics(self, batch: DataProto) -> Metrics:
        """``val/reverse_kl`` and ``val/<source>/reverse_kl`` over the prompts that the teacher can read, and the reward
        figures of all, where there are any.
        """
        metrics = super().validation_metrics(batch)
        readable = self.readable_by_teacher(batch)
        if self.samples_validation and len(readable):
            metrics |= compute_validation_distill_metrics(readable)
        return metrics

    def readable_by_teacher(self, batch: DataProto) -> DataProto:
        """The rows whose prompt holds no extended token: an item in an answer to any other is no leak, and the
        teacher's opinion of it is void.
        """
        start = self.config.actor_rollout_ref.rollout.extend_start
        return batch if start is None else batch.select_idxs((batch.tensor("prompts") < start).all(dim=-1))

    @property
    def samples_validation(self) -> bool:
        """The reverse KL is an average over the student's own samples: greedy answers do not estimate it."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        return sampling.do_sample and sampling.temperature > 0

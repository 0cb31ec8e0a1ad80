"""On-policy distillation as a trainer: the reference is a teacher, and its disagreement is what is learned from.

Always a teacher or several, and metrics of its own in training and validation. The clipped reverse KL is an advantage
estimator in ``core_algos``, exact objectives are computed by the update; the loop is the base class's. With
``algorithm.distill.coef`` there is a task reward beside it, and the update follows both::

    sampled:  advantage = task's estimator + coef x weight of the row's teacher x clipped reverse-KL term
    exact:    loss = policy loss of the task's advantage + coef x divergence
"""

import logging
from typing import Any

import numpy as np
import torch

from verl.config import BASE_TEACHER, PPOConfig
from verl.experimental.agent_loop.base import TEACHER_KNOWS_EXTENDED
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage
from verl.trainer.ppo.metric_utils import (
    compute_advantage_part_metrics,
    compute_on_policy_distill_data_metrics,
    compute_validation_distill_metrics,
)
from verl.trainer.ppo.ray_trainer import Metrics, RayPPOTrainer

logger = logging.getLogger(__name__)


class RayOnPolicyDistillTrainer(RayPPOTrainer):
    """The student answers, the teacher scores every token it knows, the student follows the reverse KL."""

    def __init__(self, config: PPOConfig, *parts: Any, **options: Any) -> None:
        """As the base class.

        Raises:
            ValueError: as the base class, and where a further teacher has no row to judge, or a setting none to serve.
        """
        super().__init__(config, *parts, **options)
        if config.algorithm.distill.teachers:
            self._check_teachers_have_rows()

    def _check_teachers_have_rows(self) -> None:
        distill, data = self.config.algorithm.distill, self.train_dataset
        kinds = set(zip(data.sources, data.has_extended, strict=True))
        judged = {distill.teacher_of(source, has_extended) for source, has_extended in kinds}
        for place, (name, teacher) in enumerate(distill.teachers.items(), 1):
            if place not in judged:
                raise ValueError(
                    f"algorithm.distill.teachers.{name}.sources={teacher.sources} with prompts={teacher.prompts} "
                    "matches no usable training row that no teacher before it claims; the sources are "
                    f"{sorted(set(data.sources))}, and prompts with item tokens have "
                    f"{sorted(source for source, has_extended in kinds if has_extended)}"
                )
        if 0 not in judged and not any(teacher.is_stitched for teacher in distill.teachers.values()):
            claims = {name: teacher.sources for name, teacher in distill.teachers.items()}
            raise ValueError(
                f"actor_rollout_ref.ref.model.path judges no row: algorithm.distill.teachers claims all, by {claims}; "
                "give each the sources that are its own, such as [rec_*]"
            )
        distill.check_base_settings(kinds)

    @property
    def uses_reference(self) -> bool:
        """Whether teachers are asked before the update: not where it runs them, unless a KL term needs them earlier."""
        return not self.teachers_run_in_update or super().uses_reference

    @property
    def teachers_run_in_update(self) -> bool:
        """Whether the update runs the teachers itself, and so has their scores from the same pass."""
        return self.config.algorithm.distill.needs_full_distribution and not self.exports_hidden_states

    @property
    def roles(self) -> list[str]:
        """The student, then its teachers in the order of ``algorithm.distill``."""
        return ["actor", *self.config.algorithm.distill.roles]

    def worker_arguments(self, role: str) -> dict[str, Any]:
        """The student knows its objective, a teacher what it is and what the objective asks of it."""
        distill, base = self.config.algorithm.distill, super().worker_arguments(role)
        if role == "actor":
            return base | {"distill": distill}
        asked = {"topk": distill.topk_or_none, "exports_hidden_states": self.exports_hidden_states}
        return base | asked | {"teacher": distill.teachers.get(role)}

    @property
    def exports_hidden_states(self) -> bool:
        """Whether the teachers' hidden states go to the student's ranks: the update needs them, and they are apart."""
        return self.config.algorithm.distill.needs_full_distribution and bool(
            self.config.trainer.teacher_ranks_on_nodes
        )

    def init_workers(self, in_process: bool = False) -> None:
        """As the base class; a student whose teachers export hidden states gets their heads."""
        super().init_workers(in_process)
        self.fetch_heads()

    def fetch_heads(self) -> None:
        """Tell the student's ranks where to fetch the heads that the hidden states go with; they never change."""
        if self.exports_hidden_states:
            roles = self.config.algorithm.distill.roles
            self.actor_wg.fetch_heads({role: self.role_groups[role].export_heads()[0] for role in roles})

    def prepare(self, rows: dict[str, Any], *, n: int, validate: bool = False) -> DataProto:
        """As in the base class; where there are several teachers, with the place of each row's among them (B,)."""
        batch, distill = super().prepare(rows, n=n, validate=validate), self.config.algorithm.distill
        if not distill.teachers:
            return batch
        sources = [str(source) for source in batch.array("source")]
        has_extended = batch.array("has_extended") if distill.routes_by_prompt else [False] * len(sources)
        kinds = list(zip(sources, has_extended, strict=True))
        batch.non_tensor_batch[TEACHER_KNOWS_EXTENDED] = np.array(
            [distill.teacher_knows_extended(*kind) for kind in kinds]
        )
        places = torch.tensor([distill.teacher_of(*kind) for kind in kinds])
        return batch.union(DataProto.from_dict({"teacher": places}))

    def ref_log_prob(self, batch: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R) and what else an exact objective wants, each row's by its own teacher."""
        distill = self.config.algorithm.distill
        if not distill.teachers:
            return self.ask_teacher(BASE_TEACHER, batch)
        scores, order = [], []
        for place, role in enumerate(distill.roles):
            rows = (batch.tensor("teacher") == place).nonzero().flatten()
            if len(rows):
                scores.append(self.ask_teacher(role, batch.select_idxs(rows)))
                order.append(rows)
        joined = DataProto.concat(scores)
        joined.reorder(torch.cat(order).argsort())
        return joined

    def ask_teacher(self, role: str, batch: DataProto) -> DataProto:
        """A teacher's ``ref_log_prob`` of its own rows, and what an update needs that cannot run the teacher."""
        scores_ahead = self.config.algorithm.distill.topk_or_none is not None or self.exports_hidden_states
        if scores_ahead and not batch.meta_info["validate"]:
            return self.role_groups[role].score_for_update(batch)
        return self.role_groups[role].compute_ref_log_prob(batch)

    def update_actor(self, batch: DataProto) -> DataProto:
        """As the base class; with it ``ref_log_prob`` (B, R) at trained positions, where the update runs the teachers.

        Handles to hidden states are dropped from ``batch`` afterwards, which frees these.
        """
        updated = super().update_actor(batch)
        batch.non_tensor_batch.pop("teacher_states", None)
        return updated

    @property
    def uses_reward(self) -> bool:
        """Whether there is a task reward beside distillation; else a reward function serves validation alone."""
        return self.config.algorithm.learns_from_reward

    @property
    def uses_advantage(self) -> bool:
        """An exact objective follows none, unless there is a task reward beside it, whose the advantage then is."""
        return self.config.algorithm.distill.has_policy_loss

    def advantage(self, batch: DataProto) -> DataProto:
        """As in the base class; beside a task reward the sums of both parts, unless distillation is in the loss."""
        weighed = super().advantage(batch)
        if self.adds_advantages:
            part = distillation_advantage(batch, self.config.algorithm)
            for key in ("advantages", "returns"):
                weighed.batch[key] = weighed.tensor(key) + part
        return weighed

    @property
    def adds_advantages(self) -> bool:
        """Whether the advantage is the sum of a reward's and distillation's; an exact objective is in the loss."""
        return self.uses_reward and not self.config.algorithm.distill.is_exact

    def step_metrics(self, batch: DataProto) -> Metrics:
        """The base metrics and the ``distill/*`` family: per data source, per teacher, and overall over the rows whose
        teacher lacks the item tokens, for an item is no leak where it was asked for. Beside a task reward also what
        each part puts into the advantage.
        """
        measured = compute_on_policy_distill_data_metrics(batch, self.config.algorithm)
        lacking = self.rows_of_lacking_teachers(batch)
        if len(lacking) < len(batch):
            overall = compute_on_policy_distill_data_metrics(lacking, self.config.algorithm) if len(lacking) else {}
            measured = _with_overall(measured, overall)
        if self.adds_advantages:
            measured |= compute_advantage_part_metrics(batch, self.config.algorithm)
        return super().step_metrics(batch) | measured

    def rows_of_lacking_teachers(self, batch: DataProto) -> DataProto:
        """The rows whose teacher lacks the item tokens: all of them where there is one teacher."""
        if TEACHER_KNOWS_EXTENDED not in batch.non_tensor_batch:
            return batch
        return batch.select_idxs(~batch.non_tensor_batch[TEACHER_KNOWS_EXTENDED].astype(bool))

    def score_validation(self, batch: DataProto) -> DataProto:
        """Log-probs of student and teacher for the held-out reverse KL; rewards where there is a function."""
        scores = super().score_validation(batch)
        if self.samples_validation:
            scores = scores.union(self.old_log_prob(batch)).union(self.ref_log_prob(batch))
        return scores

    def validation_metrics(self, batch: DataProto) -> Metrics:
        """``val/reverse_kl`` and ``val/<source>/reverse_kl`` over the rows of teachers that lack the item tokens, as
        far as they can read the prompt, and the reward metrics of all, where there are any.
        """
        metrics = super().validation_metrics(batch)
        readable = self.readable_by_teacher(self.rows_of_lacking_teachers(batch))
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


def _with_overall(measured: Metrics, overall: Metrics) -> Metrics:
    """The metrics per source of ``measured``, and the overall ones of ``overall``."""
    by_source = {name: value for name, value in measured.items() if name.count("/") > 1}
    return by_source | {name: value for name, value in overall.items() if name.count("/") == 1}

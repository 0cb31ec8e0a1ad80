"""On-policy distillation as a trainer: the student learns from one teacher or several.

It overrides stages of ``RayPPOTrainer``: which teacher scores which row, advantages, metrics. The clipped reverse KL is
an advantage estimator in ``core_algos``, which the update calls where its own pass scores the student; exact
objectives are computed by the update. With ``algorithm.distill.coef`` there is a task reward too, and the update
follows both::

    sampled:  advantage = task's estimator + coef x weight of the row's teacher x clipped reverse-KL term
    exact:    loss = policy loss of the task's advantage + coef x divergence
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from verl.config import BASE_TEACHER, PPOConfig
from verl.experimental.agent_loop.worker import chat_template, load_tools
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage
from verl.trainer.ppo.core_algos import reads_student_scores
from verl.trainer.ppo.metric_utils import (
    compute_advantage_part_metrics,
    compute_on_policy_distill_data_metrics,
    compute_validation_distill_metrics,
)
from verl.trainer.ppo.ray_trainer import Metrics, RayPPOTrainer
from verl.trainer.ppo.teacher_prompt import TeacherPrompts
from verl.utils.torch_functional import knows_extended

logger = logging.getLogger(__name__)


class RayOnPolicyDistillTrainer(RayPPOTrainer):
    """The student answers, the teacher scores every token it knows, the student follows the reverse KL."""

    def __init__(self, config: PPOConfig, *parts: Any, **options: Any) -> None:
        """As the base class.

        Raises:
            ValueError: as the base class, and where a teacher has no training row, or a setting no row to act on.
        """
        super().__init__(config, *parts, **options)
        if config.algorithm.distill.teachers:
            self._check_teachers_have_rows()
        scored = self.val_loader if config.actor_rollout_ref.rollout.validates_policy else None
        held_out: Any = scored and scored.dataset
        if any(teacher.own_prompt for teacher in config.teachers.values()):
            self.teacher_prompts.check(self.train_dataset, held_out, self.teachers_run_in_update)
        if self.scores_as_they_come:
            self.rollouts.score = self.begin_scores

    @cached_property
    def teacher_prompts(self) -> TeacherPrompts:
        """Made with the chat template of the agent loops."""
        tools = load_tools(self.config.actor_rollout_ref.rollout)
        return TeacherPrompts(self.config, chat_template(self.config, self.tokenizer, tools))

    def _check_teachers_have_rows(self) -> None:
        distill, data = self.config.algorithm.distill, self.train_dataset
        kinds = set(zip(data.sources, data.has_extended, strict=True))
        used = {distill.teacher_of(source, has_extended) for source, has_extended in kinds}
        for place, (name, teacher) in enumerate(distill.teachers.items(), 1):
            if place not in used:
                raise ValueError(
                    f"algorithm.distill.teachers.{name}.sources={teacher.sources} with prompts={teacher.prompts} "
                    "matches no usable training row that no teacher before it claims; the sources are "
                    f"{sorted(set(data.sources))}, and prompts with item tokens have "
                    f"{sorted(source for source, has_extended in kinds if has_extended)}"
                )
        # A stitched teacher needs the base teacher's model even where that has no rows of its own.
        if 0 not in used and not any(teacher.is_stitched for teacher in distill.teachers.values()):
            claims = {name: teacher.sources for name, teacher in distill.teachers.items()}
            raise ValueError(
                f"actor_rollout_ref.ref.model.path has no training row: algorithm.distill.teachers claims all, by "
                f"{claims}; give each the sources that are its own, such as [rec_*]"
            )
        # Again, now with the rows that there are: the settings alone know only patterns.
        distill.check_base_settings(kinds)

    @property
    def uses_reference(self) -> bool:
        """Whether teachers score before the update: not where it runs them, unless a KL term needs them earlier."""
        return not self.teachers_run_in_update or super().uses_reference

    @property
    def teachers_run_in_update(self) -> bool:
        """Whether the update runs the teachers itself, which gives their scores in the same pass."""
        return self.config.algorithm.distill.needs_full_distribution and not self.exports_hidden_states

    @property
    def roles(self) -> list[str]:
        """The student, then its teachers in the order of ``algorithm.distill``."""
        return ["actor", *self.config.algorithm.distill.roles]

    def worker_arguments(self, role: str) -> dict[str, Any]:
        """The student gets its objective, a teacher its settings and what the objective needs of it."""
        distill, base = self.config.algorithm.distill, super().worker_arguments(role)
        if role == "actor":
            part = None if distill.is_divergence else partial(distillation_advantage, config=self.config.algorithm)
            return base | {"distill": distill, "advantage_part": part}
        needed = {"topk": distill.topk_or_none, "exports_hidden_states": self.exports_hidden_states}
        return base | needed | {"teacher": distill.teachers.get(role)}

    @property
    def exports_hidden_states(self) -> bool:
        """Whether teachers on other ranks send their hidden states to the student's, for its update needs them."""
        apart = bool(self.config.trainer.teacher_ranks_on_nodes)
        return apart and self.config.algorithm.distill.needs_full_distribution

    @property
    def scores_as_they_come(self) -> bool:
        """Whether teachers score answers as these come: where all are servers, or on ranks of their own.

        Not hidden states of batches ahead: they would be in the object store beside those of the batch that trains. Nor
        where more is asked than trained on: which answers are taken shows at the end.
        """
        config, distill = self.config, self.config.algorithm.distill
        served, stitched = config.served_roles, any(teacher.is_stitched for teacher in distill.teachers.values())
        apart = bool(config.teacher_ranks_on_nodes) or {*distill.roles} <= {*served}
        ahead = config.trainer.max_staleness > 0 and self.exports_hidden_states
        return apart and not (served and stitched) and not ahead and config.actor_rollout_ref.rollout.oversample == 1

    def init_workers(self, in_process: bool = False) -> None:
        """As the base class; a student whose teachers export hidden states gets their heads."""
        super().init_workers(in_process)
        self.fetch_heads()
        if self.scores_as_they_come:
            self.worker_groups.watch(self.rollouts.poll)

    def fetch_heads(self) -> None:
        """Give the student's ranks the heads that belong to exported hidden states; they never change."""
        if self.exports_hidden_states:
            roles = self.config.algorithm.distill.roles
            # Every rank takes part in gathering a head; rank 0 alone returns it.
            self.actor_wg.fetch_heads({role: self.role_groups[role].export_heads()[0] for role in roles})

    def prepare(self, rows: dict[str, Any], *, n: int, validate: bool = False, step: int | None = None) -> DataProto:
        """As in the base class; with several teachers also which of them each row has (B,)."""
        batch, distill = super().prepare(rows, n=n, validate=validate, step=step), self.config.algorithm.distill
        if not distill.teachers:
            return batch
        sources = [str(source) for source in batch.array("source")]
        has_extended = batch.array("has_extended") if distill.routes_by_prompt else [False] * len(sources)
        kinds = list(zip(sources, has_extended, strict=True))
        batch.non_tensor_batch["teacher_knows_extended"] = np.array(
            [distill.teacher_knows_extended(*kind) for kind in kinds]
        )
        places = torch.tensor([distill.teacher_of(*kind) for kind in kinds])
        return batch.union(DataProto.from_dict({"teacher": places}))

    @property
    def student_scores_in_update(self) -> bool:
        """As in the base class; distillation's part of an advantage is no reason for a stage: the update can add it."""
        algorithm = self.config.algorithm
        own = type(self).advantage is not RayOnPolicyDistillTrainer.advantage
        task_reads = self.uses_reward and reads_student_scores(algorithm)
        reads = own or task_reads or algorithm.rollout_correction.rollout_is is not None
        return self.config.takes_one_step and not (self.uses_advantage and reads)

    def ref_log_prob(self, batch: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R) and what else a divergence objective needs, each row's by its own teacher."""
        if "answer_row" in batch.batch:
            scores = self.rollouts.scores_of(batch)
        else:
            scores = joined(*self.each_teacher(batch, self.score_with))
        for name, parts in scores.meta_info.pop("metrics", {}).items():
            self.stage_metrics[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        return scores

    def begin_scores(self, batch: DataProto) -> Callable[[], DataProto]:
        """Begin what `ref_log_prob` does, by teachers that the student's ranks leave alone; what it returns waits."""

        def begin(role: str, rows: DataProto) -> Callable[[], DataProto]:
            call = self.role_groups[role].begin(*self.scoring_call(role, rows))
            return partial(with_sums, call, role, int(rows.tensor("response_mask").sum()))

        begun, places = self.each_teacher(batch, begin)
        return lambda: joined([scores() for scores in begun], places)

    def each_teacher(
        self, batch: DataProto, call: Callable[[str, DataProto], Any]
    ) -> tuple[list[Any], list[torch.Tensor]]:
        """What ``call`` gives for each teacher that has rows, and these rows' places in the batch."""
        roles = self.config.algorithm.distill.roles
        if len(roles) == 1:
            return [call(BASE_TEACHER, batch)], []
        results, places = [], []
        for place, role in enumerate(roles):
            rows = (batch.tensor("teacher") == place).nonzero().flatten()
            if len(rows):
                results.append(call(role, batch.select_idxs(rows)))
                places.append(rows)
        return results, places

    def scoring_call(self, role: str, batch: DataProto) -> tuple[str, DataProto]:
        """The method of a teacher that gives what is needed of it, and the rows as it reads them."""
        scores_ahead = self.config.algorithm.distill.topk_or_none is not None or self.exports_hidden_states
        batch = self.as_read(batch, [role] * len(batch))
        # Validation has no update, so nothing is kept for one.
        keeps = scores_ahead and not batch.meta_info["validate"]
        return "score_for_update" if keeps else "compute_ref_log_prob", batch

    def score_with(self, role: str, batch: DataProto) -> DataProto:
        """A teacher's ``ref_log_prob`` of its own rows, and what an update needs that cannot run the teacher."""
        method, rows = self.scoring_call(role, batch)
        call = partial(getattr(self.role_groups[role], method), rows)
        return with_sums(call, role, int(batch.tensor("response_mask").sum()))

    def as_read(self, batch: DataProto, roles: list[str], in_update: bool = False) -> DataProto:
        """The rows as their teachers read them, by the role of each row's; the batch itself where none differs."""
        own = any(self.config.teachers[role].own_prompt for role in {*roles})
        return self.teacher_prompts.as_read(batch, roles, in_update) if own else batch

    def update_actor(self, batch: DataProto) -> DataProto:
        """As the base class; new keys are also the advantages that it made, in place of the task's alone.

        Handles of the teachers' hidden states are dropped from ``batch`` afterwards, which frees the states.
        """
        read = batch
        if self.teachers_run_in_update:
            roles, places = self.config.algorithm.distill.roles, batch.batch.get("teacher", torch.zeros(len(batch)))
            read = self.as_read(batch, [roles[int(place)] for place in places], in_update=True)
        if read is not batch:
            theirs = {f"teacher_{key}": read.tensor(key) for key in ("input_ids", "attention_mask")}
            batch = batch.select().union(DataProto.from_dict(theirs))
        updated = super().update_actor(batch)
        batch.non_tensor_batch.pop("teacher_states", None)
        if "old_log_probs" not in batch.batch and not self.config.algorithm.distill.is_divergence:
            updated.union(self.add_distillation(batch, batch.select().union(updated)))
        return updated

    @property
    def uses_reward(self) -> bool:
        """Whether there is a task reward beside distillation; else a reward function serves validation alone."""
        return self.config.algorithm.learns_from_reward

    @property
    def uses_advantage(self) -> bool:
        """Whether the update follows an advantage: with a divergence objective only that of a task reward beside it."""
        return self.config.algorithm.distill.has_policy_loss

    def advantage(self, batch: DataProto) -> DataProto:
        """As in the base class; beside a task reward the sum of both parts, unless distillation is in the loss.

        Distillation's part is not there yet where the update gives the student's scores.
        """
        scored = "old_log_probs" in batch.batch
        weighted = super().advantage(batch) if self.uses_reward or scored else DataProto()
        if self.adds_advantages and scored:
            weighted.union(self.add_distillation(weighted, batch))
        return weighted

    def add_distillation(self, task: DataProto, batch: DataProto) -> DataProto:
        """``advantages`` and ``returns`` of both parts; those of the task, if any, are taken out of ``task``."""
        part = distillation_advantage(batch, self.config.algorithm)
        return DataProto.from_dict({key: task.batch.pop(key, 0.0) + part for key in ("advantages", "returns")})

    @property
    def adds_advantages(self) -> bool:
        """Whether the advantage is the sum of a reward's and distillation's; a divergence is in the loss."""
        return self.uses_reward and not self.config.algorithm.distill.is_divergence

    def step_metrics(self, batch: DataProto) -> Metrics:
        """The base metrics and the ``distill/*`` family; beside a task reward also the share of each part.

        Overall ``distill/*`` is over rows whose teacher lacks the item tokens, since elsewhere an item is no leak.
        """
        measured = compute_on_policy_distill_data_metrics(batch, self.config.algorithm)
        lacking = self.rows_of_lacking_teachers(batch)
        if len(lacking) < len(batch):
            overall = compute_on_policy_distill_data_metrics(lacking, self.config.algorithm) if len(lacking) else {}
            # distill/NAME is overall; names per source and per teacher have a slash more.
            measured = {name: value for name, value in measured.items() if name.count("/") > 1}
            measured |= {name: value for name, value in overall.items() if name.count("/") == 1}
        if self.adds_advantages:
            measured |= compute_advantage_part_metrics(batch, self.config.algorithm)
        return super().step_metrics(batch) | measured

    def rows_of_lacking_teachers(self, batch: DataProto) -> DataProto:
        """The rows whose teacher lacks the item tokens: all of them where there is one teacher, or no item token."""
        known = knows_extended(batch).numpy()
        if self.config.actor_rollout_ref.rollout.extend_start is None or not known.any():
            return batch
        return batch.select_idxs(~known)

    def score_validation(self, batch: DataProto) -> DataProto:
        """Log-probs of student and teacher for the held-out reverse KL; rewards where there is a function."""
        scores = super().score_validation(batch)
        if self.config.actor_rollout_ref.rollout.validates_policy:
            scores = scores.union(self.old_log_prob(batch)).union(self.ref_log_prob(batch))
        return scores

    def validation_metrics(self, batch: DataProto) -> Metrics:
        """``val/reverse_kl`` and ``val/<source>/reverse_kl``, and the reward metrics of all rows where there are any.

        The former are over rows without item tokens in the prompt whose teacher lacks these: to other prompts an item
        is no leak, and the teacher cannot score it.
        """
        metrics, readable = super().validation_metrics(batch), self.rows_of_lacking_teachers(batch)
        if (start := self.config.actor_rollout_ref.rollout.extend_start) is not None:
            prompts = readable.tensor("prompts")
            real = readable.tensor("attention_mask")[:, : prompts.shape[1]].bool()  # a pad token may be an extended id
            readable = readable.select_idxs(((prompts < start) | ~real).all(dim=-1))
        if self.config.actor_rollout_ref.rollout.validates_policy and len(readable):
            metrics |= compute_validation_distill_metrics(readable)
        return metrics


def with_sums(call: Callable[[], DataProto], role: str, positions: int) -> DataProto:
    """A teacher's scores; the means that a served one measures as sums with the number of positions, by its role."""
    scores, family = call(), "distill" if role == BASE_TEACHER else f"distill_teacher/{role}"
    if means := scores.meta_info.pop("metrics", {}):
        sums = {name.replace("distill", family, 1): [(mean * positions, positions)] for name, mean in means.items()}
        scores.meta_info["metrics"] = sums
    return scores


def joined(scores: Sequence[DataProto], places: Sequence[torch.Tensor]) -> DataProto:
    """The rows of several teachers at their places in the batch; of one as they are."""
    if len(scores) == 1:
        return scores[0]
    whole = DataProto.concat(scores)
    # argsort of a permutation is its inverse: every row goes back to its place.
    whole.reorder(torch.cat(list(places)).argsort())
    return whole

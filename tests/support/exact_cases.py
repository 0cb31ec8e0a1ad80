"""Students with their teachers in one process, batches for several teachers, and losses from whole distributions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
from support.tiny_workers import (
    draw_rows,
    plain_log_probs,
    rollouts,
    with_loss_inputs,
)
from verl.config import ActorRolloutRefConfig, DistillConfig, PPOConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker

ROWS, TEMPERATURE, MISSING = 8, 1.3, -40.0
LEAK = {"leak_coef": 0.5, "leak_target": 0.2}


def mixed_batch(student_ids: int, extend_start: int, teachers: int) -> DataProto:
    """Rows of all lengths, some with extended tokens, spread over the teachers in turn."""
    batch = rollouts(draw_rows(ROWS, student_ids, seed=2), extend_start, TEMPERATURE)
    assert batch.tensor("distill_special_token_mask").any()
    return with_loss_inputs(batch).union(DataProto.from_dict({"teacher": torch.arange(ROWS) % teachers}))


def workers(config: ActorRolloutRefConfig, distill: DistillConfig) -> StudentWorker:
    """A student with its teachers beside it, as they are in one process of a worker group."""
    student, held = StudentWorker(config, "cpu", distill), teacher_workers(config, distill)
    student.colocated_roles = {"actor": student, **held}
    for teacher in held.values():
        teacher.colocated_roles = student.colocated_roles
    for worker in student.colocated_roles.values():
        worker.init_model()
    return student


def workers_apart(
    config: ActorRolloutRefConfig, distill: DistillConfig, of_teachers: ActorRolloutRefConfig | None = None
) -> tuple[StudentWorker, dict[str, TeacherWorker]]:
    """A student, and its teachers as they are on ranks of their own; they may have settings of their own."""
    student, held = StudentWorker(config, "cpu", distill), teacher_workers(of_teachers or config, distill, lends=True)
    for teacher in held.values():
        teacher.colocated_roles = held
        teacher.init_model()
    student.init_model()
    student.fetch_heads({role: teacher.export_heads() for role, teacher in held.items()})
    return student, held


def teacher_workers(
    config: ActorRolloutRefConfig, distill: DistillConfig, lends: bool = False
) -> dict[str, TeacherWorker]:
    """The teachers by role, not started yet."""
    return {
        role: TeacherWorker(config, "cpu", distill.teachers.get(role), distill.topk_or_none, lends)
        for role in distill.roles
    }


def scored(held: Mapping[str, Any], distill: DistillConfig, batch: DataProto, apart: bool = False) -> DataProto:
    """The batch with what each row's teacher says of it, as the trainer joins it; ``held``: workers or groups."""
    trainer: Any = object.__new__(RayOnPolicyDistillTrainer)
    trainer.config, trainer.role_groups = PPOConfig(), held
    trainer.config.algorithm.distill = distill
    trainer.config.trainer.teacher_nnodes, trainer.config.trainer.teacher_n_gpus_per_node = (
        (1, 1) if apart else (None, None)
    )
    batch.meta_info["validate"] = False
    return batch.union(trainer.ref_log_prob(batch))


def dense_loss(log_p, log_q, distill: DistillConfig, full: bool, extend_start: int) -> torch.Tensor:
    """D + leak (B, R) from the student's log-probs over all its ids and the teacher's over its own."""
    mass = log_p[..., extend_start:].exp().sum(-1)
    if not full and distill.support == "shared":
        log_p = log_p[..., :extend_start].log_softmax(-1)
    missing = torch.full((*log_p.shape[:-1], log_p.shape[-1] - log_q.shape[-1]), MISSING)
    log_q = torch.cat([log_q, missing], dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    if full or not distill.leak_coef:
        return divergence
    delta = distill.leak_target
    leak = delta * (delta / mass).log() + (1 - delta) * ((1 - delta) / (1 - mass)).log()
    return divergence + distill.leak_coef * leak


def teachers_of(count: int, frozen_model: Path) -> dict[str, TeacherConfig]:
    """Up to two further teachers: one that knows all ids, and the same stitched to the base teacher."""
    further = {
        "kept": TeacherConfig(path=str(frozen_model), sources=["rec_*"], weight=0.6),
        "mixed": TeacherConfig(path=str(frozen_model), vocabulary="stitched", sources=["mixed"], weight=1.3),
    }
    return dict(list(further.items())[: count - 1])


def dense_teachers(models, batch, student_ids: int, extend_start: int) -> dict[str, torch.Tensor]:
    """Log-probs (B, R, ids) of each vocabulary's teacher. ``models``: student, base teacher, frozen student."""
    _, base, frozen = models
    pad = AutoTokenizer.from_pretrained(base.name_or_path).pad_token_id
    unreadable = batch.tensor("input_ids") >= extend_start
    readable = DataProto.from_dict({**batch.batch, "input_ids": batch.tensor("input_ids").masked_fill(unreadable, pad)})
    with torch.no_grad():
        by_base = plain_log_probs(base, readable, extend_start, TEMPERATURE)
        by_frozen = plain_log_probs(frozen, batch, student_ids, TEMPERATURE)
    inside = by_frozen[..., extend_start:]
    outside = (1 - inside.exp().sum(-1, keepdim=True)).log()
    return {"base": by_base, "full": by_frozen, "stitched": torch.cat([by_base + outside, inside], dim=-1)}


def expected_loss(models, batch, distill, student_ids, extend_start) -> torch.Tensor:
    """The mean over trained tokens, each row by its own teacher. ``models``: student, base teacher, frozen student."""
    log_p = plain_log_probs(models[0], batch, student_ids, TEMPERATURE)
    by_vocabulary = dense_teachers(models, batch, student_ids, extend_start)
    losses = dense_loss(log_p, by_vocabulary["base"], distill, False, extend_start)
    for place, teacher in enumerate(distill.teachers.values(), 1):
        own = dense_loss(log_p, by_vocabulary[teacher.vocabulary], distill, True, extend_start) * teacher.weight
        losses = torch.where(batch.tensor("teacher")[:, None] == place, own, losses)
    mask = batch.tensor("response_mask")
    return (losses * mask).sum() / mask.sum()

"""Students with their teachers in one process, batches for several teachers, and losses from whole distributions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel

from support.loop_fakes import bare_trainer
from support.tiny_workers import (
    PROMPT,
    draw_rows,
    first_gradient,
    load_plain,
    plain_log_probs,
    rollouts,
    with_loss_inputs,
    worker_config,
    write_model,
)
from verl.config import ActorRolloutRefConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.actor.teachers import TOP_TENSORS
from verl.workers.model_workers import StudentWorker, TeacherWorker

ROWS, TEMPERATURE, MISSING = 8, 1.3, -40.0
LEAK = {"leak_coef": 0.5, "leak_target": 0.2}


class Plain(NamedTuple):
    """The models as transformers loads them."""

    student: PreTrainedModel
    base: PreTrainedModel
    frozen: PreTrainedModel


def with_own_prompts(batch: DataProto) -> DataProto:
    """The rows as teachers read them that are told up to three tokens before a prompt, or no more than its end."""
    told, width = torch.zeros(2, len(batch), 3 + batch.tensor("input_ids").shape[1], dtype=torch.int64), 3 + PROMPT
    for row in range(len(batch)):
        for of_row, key in zip(told[:, row], ("input_ids", "attention_mask"), strict=True):
            of_row[3:] = batch.tensor(key)[row]
        begin = width - int(told[1, row, :width].sum())
        if row % 5 == 4:
            told[:, row, : width - 1] = 0
        else:
            told[0, row, begin - row % 4 : begin], told[1, row, begin - row % 4 : begin] = 7 + row, 1
    kept = {key: batch.tensor(key) for key in ("responses", "response_mask", "teacher")}
    return DataProto.from_dict({"input_ids": told[0], "attention_mask": told[1], **kept}, meta_info={**batch.meta_info})


def read_so(batch: DataProto, told: DataProto) -> DataProto:
    """The batch for an update whose teachers read rows so."""
    theirs = {f"teacher_{key}": told.tensor(key) for key in ("input_ids", "attention_mask")}
    return batch.select().union(DataProto.from_dict(theirs))


class Models(NamedTuple):
    """Folders of tiny models over one pair of vocabularies."""

    student: Path
    untied: Path
    """A student whose head is a tensor of its own."""
    teacher: Path
    frozen: Path
    """Another model with the student's vocabulary."""
    ids: int
    extend_start: int

    def config(self, student: Path | None = None, *, packed: bool = True, **sections: Any) -> ActorRolloutRefConfig:
        """Settings in which student and teachers use ``MISSING``; ``actor``, ``ref``, ... change their sections."""
        for name in ("actor", "ref"):
            sections[name] = {"ref_log_prob_replace_val": MISSING, **sections.get(name, {})}
        sections["model"] = {"use_remove_padding": packed, **sections.get("model", {})}
        return worker_config(student or self.student, self.teacher, extend_start=self.extend_start, **sections)

    def batch(self, teachers: int = 1, temperature: float = TEMPERATURE) -> DataProto:
        """Rows of all lengths, some with extended tokens, spread over the teachers in turn."""
        batch = rollouts(draw_rows(ROWS, self.ids, seed=2), self.extend_start, temperature)
        assert batch.tensor("distill_special_token_mask").any()
        return with_loss_inputs(batch).union(DataProto.from_dict({"teacher": torch.arange(ROWS) % teachers}))

    def distill(self, objective: str = "exact", teachers: int = 1, **settings: Any) -> DistillConfig:
        """The base teacher and up to two more: one that knows all ids, and the same stitched to the base teacher."""
        further = {
            "kept": TeacherConfig(path=str(self.frozen), sources=["rec_*"], weight=0.6),
            "mixed": TeacherConfig(path=str(self.frozen), vocabulary="stitched", sources=["mixed"], weight=1.3),
        }
        return DistillConfig(objective, teachers=dict(list(further.items())[: teachers - 1]), **settings)

    def plain(self, student: Path | None = None) -> Plain:
        return Plain(*(load_plain(folder) for folder in (student or self.student, self.teacher, self.frozen)))

    def teacher_log_probs(self, plain: Plain, batch: DataProto) -> dict[str, torch.Tensor]:
        """Log-probs (B, R, ids) of each vocabulary's teacher."""
        pad = AutoTokenizer.from_pretrained(self.teacher).pad_token_id
        input_ids = batch.tensor("input_ids")
        readable = input_ids.masked_fill(input_ids >= self.extend_start, pad)
        with torch.no_grad():
            by_base = plain_log_probs(
                plain.base, DataProto.from_dict({**batch.batch, "input_ids": readable}), self.extend_start, TEMPERATURE
            )
            by_frozen = plain_log_probs(plain.frozen, batch, self.ids, TEMPERATURE)
        inside = by_frozen[..., self.extend_start :]
        outside = (1 - inside.exp().sum(-1, keepdim=True)).log()
        return {"base": by_base, "full": by_frozen, "stitched": torch.cat([by_base + outside, inside], dim=-1)}

    def expected_loss(self, plain: Plain, batch: DataProto, distill: DistillConfig, divergence: Any = None) -> Any:
        """The mean over trained tokens, each row's from its own teacher, by autograd through whole distributions."""
        divergence = divergence or reverse_kl
        log_p = plain_log_probs(plain.student, batch, self.ids, TEMPERATURE)
        log_q = self.teacher_log_probs(plain, batch)
        size = self.extend_start if distill.support == "shared" else self.ids
        mass, delta = log_p[..., self.extend_start :].exp().sum(-1), distill.leak_target
        leak = delta * (delta / mass).log() + (1 - delta) * ((1 - delta) / (1 - mass)).log()
        losses = divergence(log_p, log_q["base"], size) + distill.leak_coef * leak
        for place, teacher in enumerate(distill.teachers.values(), 1):
            own = divergence(log_p, log_q[teacher.vocabulary], self.ids) * teacher.weight
            losses = torch.where(batch.tensor("teacher")[:, None] == place, own, losses)
        mask = batch.tensor("response_mask")
        return (losses * mask).sum() / mask.sum()


def make_models(student: Path, tokenizers: tuple[Path, Path], folder: Path) -> Models:
    """A student with an untied one, and another model with its vocabulary; and a tied teacher, whose padded rows reach
    past the first extended ids, as the real teacher's do."""
    extend_start, ids = (len(AutoTokenizer.from_pretrained(tokenizer)) for tokenizer in tokenizers)
    teacher = write_model(folder / "teacher", tokenizers[0], rows=ids - 10, seed=1)
    untied = write_model(folder / "untied", tokenizers[1], tied=False)
    frozen = write_model(folder / "frozen", tokenizers[1], seed=5)
    return Models(student, untied, teacher, frozen, ids, extend_start)


def over_support(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log-probs over the first ``size`` ids; ``MISSING`` for those that the teacher lacks."""
    return log_p[..., :size].log_softmax(-1), torch.nn.functional.pad(log_q, (0, size - log_q.shape[-1]), value=MISSING)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> torch.Tensor:
    log_p, log_q = over_support(log_p, log_q, size)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def workers(config: ActorRolloutRefConfig, distill: DistillConfig | None = None) -> StudentWorker:
    """A student with its teachers beside it, as they are in one process of a worker group."""
    student = StudentWorker(config, "cpu", distill)
    student.colocated_roles = {"actor": student, **(teacher_workers(config, distill) if distill else {})}
    for worker in student.colocated_roles.values():
        worker.colocated_roles = student.colocated_roles
        worker.init_model()
    return student


def lone_teacher(config: ActorRolloutRefConfig) -> TeacherWorker:
    """The base teacher, without a student beside it."""
    teacher = TeacherWorker(config, "cpu")
    teacher.init_model()
    return teacher


def workers_apart(
    config: ActorRolloutRefConfig, distill: DistillConfig, of_teachers: ActorRolloutRefConfig | None = None
) -> tuple[StudentWorker, dict[str, TeacherWorker]]:
    """A student, and its teachers as they are on ranks of their own; they may have settings of their own."""
    student, teachers = workers(config), teacher_workers(of_teachers or config, distill, apart=True)
    student._distill = student.actor.distill = distill
    for teacher in teachers.values():
        teacher.colocated_roles = teachers
        teacher.init_model()
    student.fetch_heads({role: teacher.export_heads() for role, teacher in teachers.items()})
    return student, teachers


def teacher_workers(
    config: ActorRolloutRefConfig, distill: DistillConfig, apart: bool = False
) -> dict[str, TeacherWorker]:
    """The teachers by role, not started yet."""
    return {
        role: TeacherWorker(config, "cpu", distill.teachers.get(role), distill.topk_or_none, apart)
        for role in distill.roles
    }


def scored(teachers: Mapping[str, Any], distill: DistillConfig, batch: DataProto, apart: bool = False) -> DataProto:
    """The batch with the scores of each row's teacher, as the trainer joins them; ``teachers``: workers or groups."""
    trainer = bare_trainer(role_groups=teachers)
    trainer.config.algorithm.distill = distill
    number = 1 if apart else None
    trainer.config.trainer.teacher_nnodes = trainer.config.trainer.teacher_n_gpus_per_node = number
    batch.meta_info["validate"] = False
    return batch.union(trainer.ref_log_prob(batch))


def distill_loss(models: Models, roles: Mapping[str, Any], distill: DistillConfig) -> tuple[Any, Any]:
    """The loss and gradient of an update, of a student as it was, whose rows are all of the last teacher."""
    student, batch = workers(models.config(), DistillConfig()), models.batch(temperature=1.0)
    student._distill = student.actor.distill = distill
    batch.tensor("teacher")[:] = len(distill.teachers)
    metrics = student.update_actor(scored(roles, distill, batch)).meta_info["metrics"]
    return metrics["actor/distill_loss"], first_gradient(student)


def dense(batch: DataProto, ids: int) -> torch.Tensor:
    """(B, R, ids) log-probs of the teachers' likeliest ids, 0 of others."""
    top_ids, log_probs = batch.tensor(TOP_TENSORS[0]).long(), batch.tensor(TOP_TENSORS[1])
    return torch.zeros(*top_ids.shape[:2], ids).scatter(-1, top_ids, log_probs)

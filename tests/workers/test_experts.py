"""A mixture of experts as student and teacher: what is trained, sent, exported and resumed.

The reference is transformers alone: each row by itself through the plain model in fp32, whole logits, and the objective
by its formula.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import MISSING, TEMPERATURE, Models, workers
from transformers import AutoTokenizer

from verl.config import ActorRolloutRefConfig, AlgoConfig, DistillConfig
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage
from verl.workers.model_workers import StudentWorker, TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")

LOW, HIGH = -30.0, 5.0
OBJECTIVES = {"sampled": "actor/pg_loss", "exact": "actor/distill_loss"}
"""Objectives, and the metric that has their loss."""


@pytest.fixture(scope="module")
def mixtures(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """An untied student and a teacher, both Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("mixtures")
    extend_start, ids = (len(AutoTokenizer.from_pretrained(tokenizer)) for tokenizer in tiny_tokenizers)
    moe = {"family": "qwen3_moe", "tied": False}
    student = tiny.write_model(folder / "student", tiny_tokenizers[1], **moe)
    teacher = tiny.write_model(folder / "teacher", tiny_tokenizers[0], rows=ids - 10, seed=1, **moe)
    return Models(student, student, teacher, student, ids, extend_start)


def rows_of(models: Models) -> list[tiny.Row]:
    return tiny.draw_rows(8, models.ids, seed=2)


def rollouts(models: Models) -> DataProto:
    return tiny.rollouts(rows_of(models), models.extend_start, TEMPERATURE)


def plain_loss(models: Models, objective: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective's mean over trained tokens, and its gradient."""
    start, pad = models.extend_start, AutoTokenizer.from_pretrained(models.teacher).pad_token_id
    student, teacher = tiny.load_plain(models.student), tiny.load_plain(models.teacher)
    losses = []
    for prompt, response in rows_of(models):
        tokens = torch.tensor(prompt + response)
        first_item = next((place for place, token in enumerate(response) if token >= start), len(response))
        drawn = torch.tensor(response[: first_item + 1], dtype=torch.int64)
        predicts = slice(len(prompt) - 1, len(prompt) - 1 + len(drawn))
        log_p = (student(tokens[None]).logits[0, predicts, : models.ids] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            known = tokens.masked_fill(tokens >= start, pad)
            log_q = (teacher(known[None]).logits[0, predicts, :start] / TEMPERATURE).log_softmax(-1)
        if objective == "exact":
            shared = log_p[:, :start].log_softmax(-1)
            losses += (shared.exp() * (shared - log_q)).sum(-1)
            continue
        for place, token in enumerate(drawn.tolist()):
            of_student = log_p[place, token]
            of_teacher = log_q[place, token] if token < start else torch.tensor(MISSING)
            advantage = (of_teacher - of_student.detach()).clamp(LOW, HIGH)
            losses.append(-advantage * (of_student - of_student.detach()).exp())
    loss = torch.stack(losses).mean()
    return loss.detach(), tiny.plain_gradient(student, loss)


def trained(config: ActorRolloutRefConfig, objective: str, batch: DataProto) -> tuple[StudentWorker, dict[str, float]]:
    """A fresh student after one update on its rank's share of the rows; the metrics."""
    distill = DistillConfig(objective, support="shared") if objective == "exact" else DistillConfig()
    student = workers(config, distill)
    share = batch.chunk(student.world_size)[student.rank]
    if objective == "sampled":
        algorithm = AlgoConfig("on_policy_distill", distill_adv_max_clip=HIGH, distill_adv_min_clip=LOW)
        student.actor.advantage_part = partial(distillation_advantage, config=algorithm)
        teacher = student.colocated_roles["ref"]
        assert isinstance(teacher, TeacherWorker)
        share = share.union(teacher.compute_ref_log_prob(share))
    return student, student.update_actor(share).meta_info["metrics"]


def save_update(config: ActorRolloutRefConfig, objective: str, batch: DataProto, folder: Path) -> None:
    """What each rank runs."""
    student, metrics = trained(config, objective, batch)
    torch.save((tiny.first_gradient(student), metrics), folder / f"seen_{student.rank}.pt")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("packed", "tokens"), [(True, 64), (True, 24), (False, 40)])
def test_loss_and_gradient_are_those_of_the_plain_model(
    objective: str, packed: bool, tokens: int, mixtures: Models
) -> None:
    config = mixtures.config(packed=packed, actor={"ppo_max_token_len_per_gpu": tokens})
    student, metrics = trained(config, objective, rollouts(mixtures))
    loss, gradient = plain_loss(mixtures, objective)
    assert metrics[OBJECTIVES[objective]] == pytest.approx(float(loss), abs=1e-5)
    tiny.assert_same_gradient(tiny.first_gradient(student), gradient)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_give_those_of_the_plain_model_too(objective: str, mixtures: Models, tmp_path: Path) -> None:
    tiny.run_ranks(2, save_update, mixtures.config(), objective, rollouts(mixtures), tmp_path)
    loss, gradient = plain_loss(mixtures, objective)
    for rank in range(2):
        of_rank, metrics = torch.load(tmp_path / f"seen_{rank}.pt")
        assert metrics[OBJECTIVES[objective]] == pytest.approx(float(loss), abs=1e-5)
        tiny.assert_same_gradient(of_rank, gradient)

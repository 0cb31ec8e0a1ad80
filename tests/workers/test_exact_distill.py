"""Exact objectives through the real workers: against whole distributions, per teacher, on one rank and two."""

from pathlib import Path

import pytest
import torch
from tiny_workers import (
    PROMPT,
    assert_same_gradient,
    draw_rows,
    first_gradient,
    load_plain,
    plain_gradient,
    plain_log_probs,
    rollouts,
    run_ranks,
    with_loss_inputs,
    worker_config,
    write_model,
)
from transformers import AutoTokenizer

from verl.protocol import DataProto
from verl.trainer.config import ActorRolloutRefConfig
from verl.workers.config import DistillConfig, TeacherConfig
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker

ROWS, TEMPERATURE, MISSING = 8, 1.3, -40.0
LEAK = {"leak_coef": 0.5, "leak_target": 0.2}
pytestmark = pytest.mark.usefixtures("one_rank")


def mixed_batch(student_ids: int, extend_start: int, teachers: int) -> DataProto:
    """Rows of all lengths, some with extended tokens, spread over the teachers in turn."""
    batch = rollouts(draw_rows(ROWS, student_ids, seed=2), extend_start, TEMPERATURE)
    assert batch.tensor("distill_special_token_mask").any()
    return with_loss_inputs(batch).union(DataProto.from_dict({"teacher": torch.arange(ROWS) % teachers}))


def workers(config: ActorRolloutRefConfig, distill: DistillConfig) -> StudentWorker:
    """A student with its teachers beside it, as they are in one process of a worker group."""
    roles: dict[str, StudentWorker | TeacherWorker] = {"actor": StudentWorker(config, "cpu", distill)}
    roles |= {role: TeacherWorker(config, "cpu", distill.teachers.get(role)) for role in distill.roles}
    for worker in roles.values():
        worker.peers = roles
    for worker in roles.values():
        worker.init_model()
    student = roles["actor"]
    assert isinstance(student, StudentWorker)
    return student


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


@pytest.fixture(scope="module")
def frozen_model(tiny_tokenizers, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("frozen"), tiny_tokenizers[1], seed=5)


@pytest.fixture(scope="module")
def untied_model(tiny_tokenizers, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("untied"), tiny_tokenizers[1], tied=False)


@pytest.mark.parametrize(
    ("support", "leak", "teachers", "limits"),
    [
        ("shared", {}, 1, {}),
        ("full", LEAK, 1, {}),
        ("shared", LEAK, 2, {}),
        ("shared", LEAK, 3, {}),
        ("shared", LEAK, 3, {"ppo_max_token_len_per_gpu": 16}),
        ("shared", LEAK, 2, {"ppo_max_token_len_per_gpu": 16}),
        ("shared", LEAK, 2, {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_gradient_is_that_of_the_whole_distributions(
    support, leak, teachers, limits, packed, student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    distill = DistillConfig("exact", support=support, teachers=teachers_of(teachers, frozen_model), **leak)
    batch = mixed_batch(student_ids, extend_start, teachers)
    limits = {**limits, "ref_log_prob_replace_val": MISSING}
    config = worker_config(
        student_model, teacher_model, extend_start=extend_start, actor=limits, model={"use_remove_padding": packed}
    )
    student = workers(config, distill)
    metrics = student.update_actor(batch).meta_info["metrics"]

    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    loss = expected_loss(models, batch, distill, student_ids, extend_start)
    assert_same_gradient(first_gradient(student), plain_gradient(models[0], loss))
    assert metrics["actor/distill_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_untied_heads(untied_model, teacher_model, frozen_model, student_ids, extend_start) -> None:
    distill = DistillConfig("exact", support="shared", teachers=teachers_of(3, frozen_model), **LEAK)
    batch = mixed_batch(student_ids, extend_start, 3)
    config = worker_config(
        untied_model,
        teacher_model,
        extend_start=extend_start,
        actor={"ref_log_prob_replace_val": MISSING},
    )
    student = workers(config, distill)
    student.update_actor(batch)
    models = load_plain(untied_model), load_plain(teacher_model), load_plain(frozen_model)
    assert models[0].lm_head.weight is not models[0].model.embed_tokens.weight
    loss = expected_loss(models, batch, distill, student_ids, extend_start)
    assert_same_gradient(first_gradient(student), plain_gradient(models[0], loss))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_scores_of_a_stitched_teacher(
    packed, rows, student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    """``ref_log_prob`` of the drawn tokens: each part's where it speaks, weighed with the mass that is left to it."""
    batch = mixed_batch(student_ids, extend_start, 1)
    config = worker_config(
        student_model,
        teacher_model,
        extend_start=extend_start,
        ref={"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": rows},
        model={"use_remove_padding": packed},
    )
    distill = DistillConfig(teachers={"mixed": TeacherConfig(str(frozen_model), "stitched")})
    scored = workers(config, distill).peers["mixed"].compute_ref_log_prob(batch).tensor("ref_log_prob")
    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    right = dense_teachers(models, batch, student_ids, extend_start)["stitched"]
    right = right.gather(-1, batch.tensor("responses")[..., None])[..., 0] * batch.tensor("attention_mask")[:, PROMPT:]
    torch.testing.assert_close(scored, right, rtol=0, atol=1e-5)
    assert batch.tensor("distill_special_token_mask").any() and scored.min() > -50, "no stand-in for item tokens"


def test_one_model_is_held_once(student_model, teacher_model, frozen_model, extend_start) -> None:
    distill = DistillConfig(teachers={"self": TeacherConfig(), "mixed": TeacherConfig(vocabulary="stitched")})
    held = workers(worker_config(student_model, teacher_model, extend_start=extend_start), distill).peers
    assert held["mixed"].actor is held["self"].actor and held["mixed"].actor is not held["ref"].actor
    other = DistillConfig(teachers={"self": TeacherConfig(), "mixed": TeacherConfig(str(frozen_model), "stitched")})
    held = workers(worker_config(student_model, teacher_model, extend_start=extend_start), other).peers
    assert held["mixed"].actor is not held["self"].actor


def test_the_frozen_student_teaches_nothing_at_first(student_model, teacher_model, student_ids, extend_start) -> None:
    """``path`` left out: the teacher is the student as it starts, from which it does not diverge."""
    distill = DistillConfig("exact", teachers={"self": TeacherConfig(sources=["*"])})
    batch = mixed_batch(student_ids, extend_start, 2)
    batch = batch.select_idxs(batch.tensor("teacher") == 1)
    config = worker_config(student_model, teacher_model, extend_start=extend_start, rows_per_step=len(batch))
    metrics = workers(config, distill).update_actor(batch).meta_info["metrics"]
    assert abs(metrics["actor/distill_divergence"]) < 1e-6 and metrics["actor/grad_norm"] < 1e-5


def test_scores_of_a_teacher_that_reads_item_tokens(student_model, teacher_model, student_ids, extend_start) -> None:
    batch = mixed_batch(student_ids, extend_start, 1)
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    teacher = TeacherWorker(config, "cpu", TeacherConfig())
    teacher.init_model()
    scored = teacher.compute_ref_log_prob(batch).tensor("ref_log_prob")
    with torch.no_grad():
        right = plain_log_probs(load_plain(student_model), batch, student_ids, TEMPERATURE)
    right = right.gather(-1, batch.tensor("responses")[..., None])[..., 0] * batch.tensor("attention_mask")[:, PROMPT:]
    torch.testing.assert_close(scored, right, rtol=0, atol=1e-5)


def test_a_teacher_elsewhere_is_an_error(student_model, student_ids, extend_start) -> None:
    student = StudentWorker(worker_config(student_model, extend_start=extend_start), "cpu", DistillConfig("exact"))
    student.init_model()
    with pytest.raises(ValueError, match="no teacher 'ref' beside the student"):
        student.update_actor(mixed_batch(student_ids, extend_start, 1))


def save_gradient(config: ActorRolloutRefConfig, distill: DistillConfig, batch: DataProto, out: Path) -> None:
    """On each rank: train on its share of the rows, and write what rank 0 has."""
    student = workers(config, distill)
    share = batch.chunk(student.world_size)[student.rank]
    student.update_actor(share)
    gradient = first_gradient(student)
    if student.rank == 0:
        torch.save(gradient, out)


def test_two_ranks_give_the_gradient_of_one(
    student_model, teacher_model, frozen_model, student_ids, extend_start, tmp_path
) -> None:
    """Rank 0 holds rows of the base teacher alone, and rank 1 of the other: both run every teacher all the same."""
    distill = DistillConfig("exact", teachers={"kept": TeacherConfig(path=str(frozen_model))}, **LEAK, support="shared")
    batch = mixed_batch(student_ids, extend_start, 2)
    batch = batch.select_idxs(batch.tensor("teacher").argsort(stable=True))
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    run_ranks(2, save_gradient, config, distill, batch, tmp_path / "gradient.pt")
    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    loss = expected_loss(models, batch, distill, student_ids, extend_start)
    assert_same_gradient(torch.load(tmp_path / "gradient.pt"), plain_gradient(models[0], loss))

"""Exact objectives through the real workers: against whole distributions, per teacher, on one rank and two."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.exact_cases import (
    LEAK,
    MISSING,
    TEMPERATURE,
    dense_teachers,
    expected_loss,
    mixed_batch,
    scored,
    teachers_of,
    workers,
)
from support.tiny_workers import (
    PROMPT,
    assert_same_gradient,
    first_gradient,
    load_plain,
    plain_gradient,
    plain_log_probs,
    run_ranks,
    worker_config,
)

from verl.config import ActorRolloutRefConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")


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


@pytest.mark.parametrize("limits", [{}, {"ppo_max_token_len_per_gpu": 16}])
def test_beside_a_task_reward_the_losses_add_up(
    limits, student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    """At the first step the policy loss has the gradient of -A x log-prob, whatever the clip."""
    further = {"kept": TeacherConfig(path=str(frozen_model), sources=["rec_*"], weight=0.6)}
    distill = DistillConfig("exact", support="shared", teachers=further, coef=0.7, **LEAK)
    batch = mixed_batch(student_ids, extend_start, 2)
    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    log_p = plain_log_probs(models[0], batch, student_ids, TEMPERATURE)
    drawn = log_p.gather(-1, batch.tensor("responses")[..., None])[..., 0]
    batch.batch["old_log_probs"] = drawn.detach()
    mask, advantages = batch.tensor("response_mask"), batch.tensor("advantages")
    task = -(advantages * (drawn - drawn.detach()).exp() * mask).sum() / mask.sum()
    divergence = expected_loss(models, batch, distill, student_ids, extend_start)
    actor = {**limits, "ref_log_prob_replace_val": MISSING}
    student = workers(worker_config(student_model, teacher_model, extend_start=extend_start, actor=actor), distill)
    metrics = student.update_actor(batch).meta_info["metrics"]

    assert_same_gradient(first_gradient(student), plain_gradient(models[0], task + 0.7 * divergence))
    assert metrics["actor/pg_loss"] == pytest.approx(task.item(), rel=1e-4)
    assert metrics["actor/distill_loss"] == pytest.approx(divergence.item(), rel=1e-4)
    assert 0 < metrics["actor/extend_divergence"] < metrics["actor/distill_divergence"]


@pytest.mark.parametrize(("support", "teachers"), [("shared", 1), ("full", 1), ("shared", 3)])
def test_the_gap_is_what_drawn_tokens_say_less_the_exact_divergence(
    support, teachers, student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    distill = DistillConfig("exact", support=support, teachers=teachers_of(teachers, frozen_model), **LEAK)
    batch = mixed_batch(student_ids, extend_start, teachers)
    limits = {"ref_log_prob_replace_val": MISSING, "ppo_max_token_len_per_gpu": 24}
    config = worker_config(student_model, teacher_model, extend_start=extend_start, actor=limits)
    metrics = workers(config, distill).update_actor(batch).meta_info["metrics"]

    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    place, drawn, gaps = batch.tensor("teacher")[:, None], batch.tensor("responses"), []
    with torch.no_grad():
        log_p = plain_log_probs(models[0], batch, student_ids, TEMPERATURE)
        by_vocabulary = dense_teachers(models, batch, student_ids, extend_start)
    for number, vocabulary in enumerate(["base", "full", "stitched"][:teachers]):
        size = extend_start if vocabulary == "base" and support == "shared" else student_ids
        of_student, log_q = log_p[..., :size].log_softmax(-1), by_vocabulary[vocabulary]
        log_q = torch.nn.functional.pad(log_q, (0, size - log_q.shape[-1]), value=MISSING)
        ratio = of_student - log_q
        judged = (batch.tensor("response_mask") * (place == number)).bool() & (drawn < size)
        sampled = ratio.gather(-1, drawn.clamp(max=size - 1)[..., None])[..., 0]
        gaps.append((sampled - (of_student.exp() * ratio).sum(-1))[judged])
    assert metrics["distill/sampled_gap"] == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-4)
    other = workers(config, dataclasses.replace(distill, objective="jsd")).update_actor(batch).meta_info["metrics"]
    assert "distill/sampled_gap" not in other, "the sampled estimate is one of the reverse KL"


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
    scored = workers(config, distill).colocated_roles["mixed"].compute_ref_log_prob(batch).tensor("ref_log_prob")
    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    right = dense_teachers(models, batch, student_ids, extend_start)["stitched"]
    right = right.gather(-1, batch.tensor("responses")[..., None])[..., 0] * batch.tensor("attention_mask")[:, PROMPT:]
    torch.testing.assert_close(scored, right, rtol=0, atol=1e-5)
    assert batch.tensor("distill_special_token_mask").any() and scored.min() > -50, "no stand-in for item tokens"


def test_one_model_is_held_once(student_model, teacher_model, frozen_model, extend_start) -> None:
    distill = DistillConfig(teachers={"self": TeacherConfig(), "mixed": TeacherConfig(vocabulary="stitched")})
    held = workers(worker_config(student_model, teacher_model, extend_start=extend_start), distill).colocated_roles
    assert held["mixed"].model is held["self"].model and held["mixed"].model is not held["ref"].model
    other = DistillConfig(teachers={"self": TeacherConfig(), "mixed": TeacherConfig(str(frozen_model), "stitched")})
    held = workers(worker_config(student_model, teacher_model, extend_start=extend_start), other).colocated_roles
    assert held["mixed"].model is not held["self"].model


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


def save_gradient(config: ActorRolloutRefConfig, distill: DistillConfig, batch: DataProto, folder: Path) -> None:
    """On each rank: train on its share of the rows, and write the gradient and what the teachers said."""
    student = workers(config, distill)
    share = batch.chunk(student.world_size)[student.rank]
    said = student.update_actor(share).tensor("ref_log_prob")
    torch.save((first_gradient(student), said), folder / f"seen_{student.rank}.pt")


def test_two_ranks_give_the_gradient_of_one(
    student_model, teacher_model, frozen_model, student_ids, extend_start, tmp_path
) -> None:
    """Rank 0 holds rows of the base teacher alone, and rank 1 of the other: both run every teacher all the same."""
    further = {"kept": TeacherConfig(path=str(frozen_model), sources=["rec_*"])}
    distill = DistillConfig("exact", teachers=further, **LEAK, support="shared")
    batch = mixed_batch(student_ids, extend_start, 2)
    batch = batch.select_idxs(batch.tensor("teacher").argsort(stable=True))
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    run_ranks(2, save_gradient, config, distill, batch, tmp_path)
    (gradient, first), (_, second) = (torch.load(tmp_path / f"seen_{rank}.pt") for rank in range(2))
    models = load_plain(student_model), load_plain(teacher_model), load_plain(frozen_model)
    loss = expected_loss(models, batch, distill, student_ids, extend_start)
    assert_same_gradient(gradient, plain_gradient(models[0], loss))
    asked = scored(workers(config, distill).colocated_roles, distill, batch).tensor("ref_log_prob")
    asked = asked * batch.tensor("response_mask")
    torch.testing.assert_close(torch.cat([first, second]), asked, rtol=0, atol=1e-5)

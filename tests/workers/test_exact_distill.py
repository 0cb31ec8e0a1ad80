"""Exact objectives through the real workers: against whole distributions, per teacher, on one rank and two."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.exact_cases import LEAK, TEMPERATURE, Models, over_support, scored, workers
from support.tiny_workers import (
    assert_same_gradient,
    first_gradient,
    of_tokens,
    plain_gradient,
    plain_log_probs,
    run_ranks,
)

from verl.config import ActorRolloutRefConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("support", "leak", "teachers", "limits", "packed", "tied"),
    [
        ("shared", {}, 1, {}, True, True),
        ("full", LEAK, 1, {}, False, True),
        ("shared", LEAK, 3, {}, True, False),
        ("shared", LEAK, 3, {"ppo_max_token_len_per_gpu": 16}, True, True),
        ("shared", LEAK, 3, {"ppo_max_token_len_per_gpu": 16}, False, True),
        ("shared", LEAK, 2, {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}, True, False),
    ],
)
def test_gradient_is_that_of_the_whole_distributions(
    support: str, leak: dict[str, float], teachers: int, limits: dict, packed: bool, tied: bool, models: Models
) -> None:
    distill = models.distill(teachers=teachers, support=support, **leak)
    batch, folder = models.batch(teachers), models.student if tied else models.untied
    student = workers(models.config(folder, packed=packed, actor=limits), distill)
    metrics = student.update_actor(batch).meta_info["metrics"]
    plain = models.plain(folder)
    loss = models.expected_loss(plain, batch, distill)
    assert_same_gradient(first_gradient(student), plain_gradient(plain.student, loss))
    assert metrics["actor/distill_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_beside_a_task_reward_the_losses_add_up(models: Models) -> None:
    """At the first step the policy loss has the gradient of -A x log-prob, whatever the clip."""
    distill, limits = models.distill(teachers=2, support="shared", coef=0.7, **LEAK), {"ppo_max_token_len_per_gpu": 16}
    batch, plain = models.batch(2), models.plain()
    drawn = of_tokens(plain_log_probs(plain.student, batch, models.ids, TEMPERATURE), batch)
    batch.batch["old_log_probs"] = drawn.detach()
    mask = batch.tensor("response_mask")
    task = -(batch.tensor("advantages") * (drawn - drawn.detach()).exp() * mask).sum() / mask.sum()
    divergence = models.expected_loss(plain, batch, distill)
    student = workers(models.config(actor=limits), distill)
    metrics = student.update_actor(batch).meta_info["metrics"]
    assert_same_gradient(first_gradient(student), plain_gradient(plain.student, task + 0.7 * divergence))
    assert metrics["actor/pg_loss"] == pytest.approx(task.item(), rel=1e-4)
    assert metrics["actor/distill_loss"] == pytest.approx(divergence.item(), rel=1e-4)
    assert 0 < metrics["actor/extend_divergence"] < metrics["actor/distill_divergence"]


@pytest.mark.parametrize(("support", "teachers"), [("shared", 1), ("full", 1), ("shared", 3)])
def test_the_gap_is_the_drawn_tokens_estimate_less_the_exact_divergence(
    support: str, teachers: int, models: Models
) -> None:
    distill, batch = models.distill(teachers=teachers, support=support, **LEAK), models.batch(teachers)
    config, plain = models.config(actor={"ppo_max_token_len_per_gpu": 24}), models.plain()
    metrics = workers(config, distill).update_actor(batch).meta_info["metrics"]
    drawn, gaps = batch.tensor("responses"), []
    with torch.no_grad():
        log_p = plain_log_probs(plain.student, batch, models.ids, TEMPERATURE)
    for number, log_q in enumerate(list(models.teacher_log_probs(plain, batch).values())[:teachers]):
        size = models.extend_start if number == 0 and support == "shared" else models.ids
        of_student, of_teacher = over_support(log_p, log_q, size)
        ratio = of_student - of_teacher
        rows = (batch.tensor("teacher") == number)[:, None]
        inside = (batch.tensor("response_mask") * rows).bool() & (drawn < size)
        sampled = ratio.gather(-1, drawn.clamp(max=size - 1)[..., None])[..., 0]
        gaps.append((sampled - (of_student.exp() * ratio).sum(-1))[inside])
    assert metrics["distill/sampled_gap"] == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-4)
    other = workers(config, dataclasses.replace(distill, objective="jsd")).update_actor(batch).meta_info["metrics"]
    assert "distill/sampled_gap" not in other, "the sampled estimate is one of the reverse KL"


@pytest.mark.parametrize(("packed", "rows"), [(True, 3), (False, 8)])
@pytest.mark.parametrize("vocabulary", ["full", "stitched"])
def test_scores_of_teachers_that_know_all_ids(vocabulary: str, packed: bool, rows: int, models: Models) -> None:
    """Also of item tokens; of a stitched teacher, each part's with the mass that is left to it."""
    ref = {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": rows}
    distill, batch = DistillConfig(teachers={"own": TeacherConfig(str(models.frozen), vocabulary)}), models.batch()
    teacher = workers(models.config(packed=packed, ref=ref), distill).colocated_roles["own"]
    scores = teacher.compute_ref_log_prob(batch).tensor("ref_log_prob")
    right = of_tokens(models.teacher_log_probs(models.plain(), batch)[vocabulary], batch)
    torch.testing.assert_close(scores, right, rtol=0, atol=1e-5)
    assert batch.tensor("distill_special_token_mask").any() and not (scores == -40.0).any()


def save_gradient(config: ActorRolloutRefConfig, distill: DistillConfig, batch: DataProto, folder: Path) -> None:
    """On each rank: train on its share of the rows, and write the gradient and the teachers' scores."""
    student = workers(config, distill)
    scores = student.update_actor(batch.chunk(student.world_size)[student.rank]).tensor("ref_log_prob")
    torch.save((first_gradient(student), scores), folder / f"seen_{student.rank}.pt")


def test_two_ranks_give_the_gradient_of_one(models: Models, tmp_path: Path) -> None:
    """Rank 0 has rows of the base teacher alone, and rank 1 of the other: both run every teacher all the same."""
    distill, batch, plain = models.distill(teachers=2, support="shared", **LEAK), models.batch(2), models.plain()
    batch = batch.select_idxs(batch.tensor("teacher").argsort(stable=True))
    run_ranks(2, save_gradient, models.config(), distill, batch, tmp_path)
    (gradient, first), (_, second) = (torch.load(tmp_path / f"seen_{rank}.pt") for rank in range(2))
    assert_same_gradient(gradient, plain_gradient(plain.student, models.expected_loss(plain, batch, distill)))
    before = scored(workers(models.config(), distill).colocated_roles, distill, batch).tensor("ref_log_prob")
    expected = before * batch.tensor("response_mask")
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-5)

"""``objective: topk`` through the real workers: the teachers name their likeliest ids, and the student follows them."""

import pytest
import torch
from support.exact_cases import LEAK, MISSING, TEMPERATURE, dense_teachers, mixed_batch, scored, teachers_of, workers
from support.tiny_workers import (
    assert_same_gradient,
    first_gradient,
    load_plain,
    plain_gradient,
    plain_log_probs,
    worker_config,
)

from verl.config import DistillConfig
from verl.workers.actor.teachers import TOP_TENSORS

pytestmark = pytest.mark.usefixtures("one_rank")


def coarse_loss(log_p, log_q, topk: int, support: int) -> torch.Tensor:
    """The reverse KL (B, R) over the likeliest ids of ``q``, its other ids as one, and ids past its vocabulary."""
    log_p = log_p[..., :support].log_softmax(-1)
    known = log_q.shape[-1]
    ids = log_q.topk(topk, dim=-1).indices

    def bucketed(values: torch.Tensor) -> torch.Tensor:
        others = values[..., :known].scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([values.gather(-1, ids), others, values[..., known:]], dim=-1)

    missing = torch.full((*log_q.shape[:-1], support - known), MISSING)
    of_student, of_teacher = bucketed(log_p), bucketed(torch.cat([log_q, missing], dim=-1))
    return (of_student.exp() * (of_student - of_teacher)).sum(-1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("teachers", "support", "topk"), [(1, "shared", 4), (1, "full", 4), (3, "shared", 7)])
def test_gradient_is_that_of_the_buckets(
    packed, tied, teachers, support, topk, student_model, untied_model, teacher_model, frozen_model, student_ids,
    extend_start,
) -> None:  # fmt: skip
    """Each row by the likeliest ids of its own teacher: base, full and stitched in one batch."""
    distill = DistillConfig("topk", topk=topk, support=support, teachers=teachers_of(teachers, frozen_model), **LEAK)
    batch, path = mixed_batch(student_ids, extend_start, teachers), student_model if tied else untied_model
    config = worker_config(
        path,
        teacher_model,
        extend_start=extend_start,
        actor={"ref_log_prob_replace_val": MISSING, "ppo_max_token_len_per_gpu": 24},
        ref={"ref_log_prob_replace_val": MISSING, "log_prob_max_token_len_per_gpu": 16},
        model={"use_remove_padding": packed},
    )
    student = workers(config, distill)
    batch = scored(student.colocated_roles, distill, batch)
    assert batch.tensor("teacher_top_ids").shape == (*batch.tensor("responses").shape, topk)
    student.update_actor(batch)

    models = load_plain(path), load_plain(teacher_model), load_plain(frozen_model)
    log_p = plain_log_probs(models[0], batch, student_ids, TEMPERATURE)
    by_vocabulary = dense_teachers(models, batch, student_ids, extend_start)
    mass, delta = log_p[..., extend_start:].exp().sum(-1), distill.leak_target
    leak = delta * (delta / mass).log() + (1 - delta) * ((1 - delta) / (1 - mass)).log()
    base_support = extend_start if support == "shared" else student_ids
    losses = coarse_loss(log_p, by_vocabulary["base"], topk, base_support) + distill.leak_coef * leak
    for place, teacher in enumerate(distill.teachers.values(), 1):
        own = coarse_loss(log_p, by_vocabulary[teacher.vocabulary], topk, student_ids) * teacher.weight
        losses = torch.where(batch.tensor("teacher")[:, None] == place, own, losses)
    mask = batch.tensor("response_mask")
    loss = (losses * mask).sum() / mask.sum()
    assert_same_gradient(first_gradient(student), plain_gradient(models[0], loss))


def test_all_ids_named_is_the_exact_objective(student_model, teacher_model, frozen_model, student_ids, extend_start):
    """K as large as any vocabulary: the same gradient as with the teachers beside the student."""
    batch, further = mixed_batch(student_ids, extend_start, 3), teachers_of(3, frozen_model)
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    exact = workers(config, DistillConfig("exact", support="shared", teachers=further, **LEAK))
    right = exact.update_actor(batch.select()).meta_info["metrics"]
    distill = DistillConfig("topk", topk=student_ids, support="shared", teachers=further, **LEAK)
    named = workers(config, distill)
    metrics = named.update_actor(scored(named.colocated_roles, distill, batch)).meta_info["metrics"]
    assert metrics["actor/distill_loss"] == pytest.approx(right["actor/distill_loss"], rel=1e-5)
    assert_same_gradient(first_gradient(named), first_gradient(exact))


def test_only_trained_tokens_are_named_and_validation_names_none(
    student_model, teacher_model, student_ids, extend_start
) -> None:
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    teacher = workers(config, DistillConfig("topk", topk=3)).colocated_roles["ref"]
    batch = mixed_batch(student_ids, extend_start, 1)
    scores, trained = teacher.score_for_update(batch), batch.tensor("response_mask").bool()
    assert (
        scores.tensor("teacher_top_ids").max() < extend_start and scores.tensor("teacher_top_ids").dtype == torch.int32
    )
    assert (scores.tensor("teacher_top_log_probs")[trained] < 0).all()
    assert not any(scores.tensor(key)[~trained].any() for key in (*TOP_TENSORS, "ref_log_prob"))
    whole = teacher.compute_ref_log_prob(batch)
    assert list(whole.batch.keys()) == ["ref_log_prob"]
    difference = (whole.tensor("ref_log_prob") - scores.tensor("ref_log_prob"))[trained]
    assert difference.abs().max() < 1e-5

"""``objective: topk`` through the real workers: the student follows the teachers' likeliest ids."""

import pytest
import torch
from support.exact_cases import LEAK, Models, over_support, scored, workers
from support.tiny_workers import assert_same_gradient, first_gradient, plain_gradient

from verl.workers.actor.teachers import TOP_TENSORS

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(("packed", "tied"), [(True, True), (False, False)])
@pytest.mark.parametrize(("teachers", "support", "topk"), [(1, "shared", 4), (1, "full", 4), (3, "shared", 7)])
def test_gradient_is_that_of_the_buckets(
    packed: bool, tied: bool, teachers: int, support: str, topk: int, models: Models
) -> None:
    """Each row by the likeliest ids of its own teacher: base, full and stitched in one batch."""

    def coarse(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> torch.Tensor:
        """The reverse KL (B, R) over the likeliest ids of ``q``, its other ids as one, and ids past its vocabulary."""
        known, ids = log_q.shape[-1], log_q.topk(topk, dim=-1).indices

        def bucketed(values: torch.Tensor) -> torch.Tensor:
            others = values[..., :known].scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([values.gather(-1, ids), others, values[..., known:]], dim=-1)

        of_student, of_teacher = map(bucketed, over_support(log_p, log_q, size))
        return (of_student.exp() * (of_student - of_teacher)).sum(-1)

    distill = models.distill("topk", teachers, topk=topk, support=support, **LEAK)
    folder = models.student if tied else models.untied
    limits = {"actor": {"ppo_max_token_len_per_gpu": 24}, "ref": {"log_prob_max_token_len_per_gpu": 16}}
    student = workers(models.config(folder, packed=packed, **limits), distill)
    batch = scored(student.colocated_roles, distill, models.batch(teachers))
    assert batch.tensor("teacher_top_ids").shape == (*batch.tensor("responses").shape, topk)
    student.update_actor(batch)
    plain = models.plain(folder)
    loss = models.expected_loss(plain, batch, distill, coarse)
    assert_same_gradient(first_gradient(student), plain_gradient(plain.student, loss))


def test_all_ids_are_the_exact_objective(models: Models) -> None:
    """K as large as any vocabulary: the same gradient as with the teachers beside the student."""
    batch = models.batch(3)
    exact = workers(models.config(), models.distill("exact", 3, support="shared", **LEAK))
    right = exact.update_actor(batch.select()).meta_info["metrics"]
    distill = models.distill("topk", 3, topk=models.ids, support="shared", **LEAK)
    student = workers(models.config(), distill)
    metrics = student.update_actor(scored(student.colocated_roles, distill, batch)).meta_info["metrics"]
    assert metrics["actor/distill_loss"] == pytest.approx(right["actor/distill_loss"], rel=1e-5)
    assert_same_gradient(first_gradient(student), first_gradient(exact))


def test_trained_tokens_alone_have_likeliest_ids_and_validation_has_none(models: Models) -> None:
    teacher = workers(models.config(), models.distill("topk", topk=3)).colocated_roles["ref"]
    batch = models.batch()
    scores, trained = teacher.score_for_update(batch), batch.tensor("response_mask").bool()
    ids = scores.tensor("teacher_top_ids")
    assert ids.max() < models.extend_start and ids.dtype == torch.int32
    assert (scores.tensor("teacher_top_log_probs")[trained] < 0).all()
    assert not any(scores.tensor(key)[~trained].any() for key in (*TOP_TENSORS, "ref_log_prob"))
    validation = teacher.compute_ref_log_prob(batch)
    assert list(validation.batch.keys()) == ["ref_log_prob"]
    difference = (validation.tensor("ref_log_prob") - scores.tensor("ref_log_prob"))[trained]
    assert difference.abs().max() < 1e-5

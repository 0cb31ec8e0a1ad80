"""Objectives over whole distributions through the real workers: against autograd, per teacher, on one rank and two.

The gradient is the same wherever teachers run: in the update, in a stage before it, or on other ranks, whose hidden
states are exported.
"""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import (
    LEAK,
    TEMPERATURE,
    Models,
    over_support,
    read_so,
    reverse_kl,
    scored,
    with_own_prompts,
    workers,
    workers_apart,
)

from verl.config import ActorRolloutRefConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.actor.losses import UPDATE_SCORES

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
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.plain_gradient(plain.student, loss))
    assert metrics["actor/distill_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_share_of_the_mixture_and_aggregation_are_those_of_the_settings(models: Models) -> None:
    distill, batch, plain = models.distill("jsd", support="shared", beta=0.3), models.batch(), models.plain()
    student = workers(models.config(actor={"loss_agg_mode": "seq-mean-token-mean"}), distill)
    student.update_actor(batch)
    log_p = tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE)
    log_p, log_q = over_support(log_p, models.teacher_log_probs(plain, batch)["base"], models.extend_start)
    log_m = (0.7 * log_p.exp() + 0.3 * log_q.exp()).log()
    jsd = (0.7 * log_p.exp() * (log_p - log_m) + 0.3 * log_q.exp() * (log_q - log_m)).sum(-1)
    mask = batch.tensor("response_mask")
    loss = ((jsd * mask).sum(-1) / mask.sum(-1)).mean()
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.plain_gradient(plain.student, loss))


def test_beside_a_task_reward_the_losses_add_up(models: Models) -> None:
    """At the first step the policy loss has the gradient of -A x log-prob, whatever the clip."""
    distill, limits = models.distill(teachers=2, support="shared", coef=0.7, **LEAK), {"ppo_max_token_len_per_gpu": 16}
    batch, plain = models.batch(2), models.plain()
    drawn = tiny.of_tokens(tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE), batch)
    batch.batch["old_log_probs"] = drawn.detach()
    mask = batch.tensor("response_mask")
    task = -(batch.tensor("advantages") * (drawn - drawn.detach()).exp() * mask).sum() / mask.sum()
    divergence = models.expected_loss(plain, batch, distill)
    student = workers(models.config(actor=limits), distill)
    metrics = student.update_actor(batch).meta_info["metrics"]
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.plain_gradient(plain.student, task + 0.7 * divergence))
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
        log_p = tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE)
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


def test_the_divergence_of_each_token_is_given_where_it_is_asked_for(models: Models) -> None:
    distill, batch, plain = models.distill(teachers=3, support="shared", **LEAK), models.batch(3), models.plain()
    with torch.no_grad():
        log_p = tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE)
    sizes = (models.extend_start, models.ids, models.ids)
    log_qs = models.teacher_log_probs(plain, batch).values()
    by_teacher = torch.stack([reverse_kl(log_p, log_q, size) for log_q, size in zip(log_qs, sizes, strict=True)])
    right = by_teacher[batch.tensor("teacher"), torch.arange(len(batch))] * batch.tensor("response_mask")
    student = workers(models.config(actor={"ppo_max_token_len_per_gpu": 24}), distill)
    batch.meta_info["keeps_divergence"] = True
    torch.testing.assert_close(student.update_actor(batch).tensor("divergence"), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("packed", "rows"), [(True, 3), (False, 8)])
@pytest.mark.parametrize("vocabulary", ["full", "stitched"])
def test_scores_of_teachers_that_know_all_ids(vocabulary: str, packed: bool, rows: int, models: Models) -> None:
    """Also of item tokens; of a stitched teacher, each part's with the mass that is left to it."""
    ref = {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": rows}
    distill, batch = DistillConfig(teachers={"own": TeacherConfig(str(models.frozen), vocabulary)}), models.batch()
    teacher = workers(models.config(packed=packed, ref=ref), distill).colocated_roles["own"]
    scores = teacher.compute_ref_log_prob(batch).tensor("ref_log_prob")
    right = tiny.of_tokens(models.teacher_log_probs(models.plain(), batch)[vocabulary], batch)
    torch.testing.assert_close(scores, right, rtol=0, atol=1e-5)
    assert batch.tensor("distill_special_token_mask").any() and not (scores == -40.0).any()


def save_gradient(config: ActorRolloutRefConfig, distill: DistillConfig, batch: DataProto, folder: Path) -> None:
    """On each rank: train on its share of the rows, and write the gradient and the teachers' scores."""
    student = workers(config, distill)
    scores = student.update_actor(batch.chunk(student.world_size)[student.rank]).tensor("ref_log_prob")
    torch.save((tiny.first_gradient(student), scores), folder / f"seen_{student.rank}.pt")


def test_two_ranks_give_the_gradient_of_one(models: Models, tmp_path: Path) -> None:
    """Rank 0 has rows of the base teacher alone, and rank 1 of the other: both run every teacher all the same."""
    distill, batch, plain = models.distill(teachers=2, support="shared", **LEAK), models.batch(2), models.plain()
    batch = batch.select_idxs(batch.tensor("teacher").argsort(stable=True))
    tiny.run_ranks(2, save_gradient, models.config(), distill, batch, tmp_path)
    (gradient, first), (_, second) = (torch.load(tmp_path / f"seen_{rank}.pt") for rank in range(2))
    tiny.assert_same_gradient(gradient, tiny.plain_gradient(plain.student, models.expected_loss(plain, batch, distill)))
    before = scored(workers(models.config(), distill).colocated_roles, distill, batch).tensor("ref_log_prob")
    expected = before * batch.tensor("response_mask")
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-5)


ROWWISE = {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}


@pytest.mark.parametrize(
    ("objective", "packed", "teachers", "settings", "limits"),
    [
        ("forward_kl", False, 1, {"support": "full"}, ROWWISE),
        ("jsd", True, 3, {"support": "shared"}, {"ppo_max_token_len_per_gpu": 16}),
        ("exact", False, 3, {"support": "full"}, {"ppo_mini_batch_size": 4, "ppo_epochs": 2, **ROWWISE}),
        ("exact", True, 2, {"support": "shared", "coef": 0.7}, {"ppo_max_token_len_per_gpu": 24}),
    ],
)
def test_scores_and_update_are_those_of_a_stage_before(
    objective: str, packed: bool, teachers: int, settings: dict[str, Any], limits: dict[str, Any], models: Models
) -> None:
    """Base, full and stitched teachers by row; each scores item tokens, known to it or not."""
    distill, batch = models.distill(objective, teachers, **settings, **LEAK), models.batch(teachers)
    config = models.config(packed=packed, actor=limits)
    student, other = workers(config, distill), workers(config, distill)
    keys = [key for key in batch.batch.keys() if key not in ("advantages", "old_log_probs")]  # noqa: SIM118
    updated = student.update_actor(batch if distill.has_policy_loss else batch.select(keys))
    before = scored(other.colocated_roles, distill, batch.select())
    scores = {"ref_log_prob": before.tensor("ref_log_prob"), **dict(other.compute_log_prob(batch).batch.items())}
    right = other.update_actor(before)
    assert len(right) == 0, "scores that are there already are not returned again"
    assert [*updated.batch.keys()] == (["ref_log_prob"] if distill.has_policy_loss else list(UPDATE_SCORES[:4]))
    for key in updated.batch.keys() if "ppo_epochs" not in limits else ["ref_log_prob"]:  # of the student as it was
        expected = scores[key] * batch.tensor("response_mask")
        torch.testing.assert_close(updated.tensor(key), expected, rtol=0, atol=1e-5)
    assert updated.meta_info == right.meta_info
    trained = tiny.weights_of(other)
    assert all(torch.equal(value, trained[name]) for name, value in tiny.weights_of(student).items())


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
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.plain_gradient(plain.student, loss))


@pytest.mark.parametrize(
    ("objective", "teachers", "packed"), [("exact", 1, True), ("exact", 3, False), ("jsd", 3, False)]
)
def test_an_update_is_that_of_teachers_beside_the_student(
    objective: str, teachers: int, packed: bool, models: Models
) -> None:
    """Rows are scored in one order and layout, and trained in others."""
    distill, batch = models.distill(objective, teachers, support="shared", **LEAK), models.batch(teachers)

    def config(packed: bool, tokens: int):
        limits = {"actor": {"ppo_max_token_len_per_gpu": tokens}, "ref": {"log_prob_max_token_len_per_gpu": tokens}}
        return models.config(packed=packed, **limits)

    beside = workers(config(packed, 64), distill)
    updated = beside.update_actor(batch.select())
    right, trained = updated.meta_info["metrics"], batch.tensor("response_mask").bool()
    student, held = workers_apart(config(packed, 24), distill, config(not packed, 16))
    batch = scored(held, distill, batch, apart=True)
    difference = (batch.tensor("ref_log_prob") - updated.tensor("ref_log_prob"))[trained]
    assert difference.abs().max() < 1e-5
    batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    metrics = student.update_actor(batch).meta_info["metrics"]
    for name in ("actor/distill_loss", "actor/distill_divergence", "actor/leak_loss", "actor/grad_norm"):
        assert metrics[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), name
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.first_gradient(beside))


@pytest.mark.parametrize(("packed", "tokens"), [(True, 64), (True, 18), (False, 24)])
def test_teachers_in_the_update_may_read_other_prompts(packed: bool, tokens: int, models: Models) -> None:
    """Answers stay aligned: what is learned is what teachers on other ranks say of these rows, as others export it."""
    distill, batch = models.distill(teachers=3, support="shared", **LEAK), models.batch(3)
    told, config = with_own_prompts(batch), models.config(packed=packed, actor={"ppo_max_token_len_per_gpu": tokens})
    student, held = workers_apart(models.config(), distill)
    exported = scored(held, distill, told, apart=True)
    handles = {"teacher_states": exported.array("teacher_states")}
    right = student.update_actor(batch.select().union(DataProto.from_dict({}, handles))).meta_info["metrics"]
    beside = workers(config, distill)
    updated = beside.update_actor(read_so(batch, told))
    found, trained = updated.meta_info["metrics"], batch.tensor("response_mask").bool()
    for name in ("actor/distill_loss", "actor/leak_loss", "actor/grad_norm"):
        assert found[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), name
    tiny.assert_same_gradient(tiny.first_gradient(beside), tiny.first_gradient(student))
    scores = exported.tensor("ref_log_prob") * trained
    torch.testing.assert_close(updated.tensor("ref_log_prob"), scores, rtol=0, atol=1e-5)
    untold, same = (workers(config, distill).update_actor(rows) for rows in (batch.select(), read_so(batch, batch)))
    assert torch.equal(same.tensor("ref_log_prob"), untold.tensor("ref_log_prob"))
    assert same.meta_info == untold.meta_info and found != untold.meta_info["metrics"]


def test_only_trained_positions_are_exported_and_nothing_stays(models: Models) -> None:
    distill = models.distill(teachers=3)
    student, held = workers_apart(models.config(), distill)
    batch = models.batch(3)
    batch.tensor("response_mask")[4] = 0
    batch = scored(held, distill, batch, apart=True)
    handles, trained = batch.array("teacher_states"), batch.tensor("response_mask").sum(-1).tolist()
    assert [0 if handle is None else len(handle()) for handle in handles] == trained and 0 in trained
    stitched = handles[[place == 2 for place in batch.tensor("teacher").tolist()]]
    assert {"hidden_0", "hidden_1"} <= {*stitched[0]().batch.keys()}
    values = [weakref.ref(handle()) for handle in handles if handle is not None]
    student.update_actor(batch)
    del handles, stitched
    batch.pop(non_tensor_batch_keys=["teacher_states"])
    gc.collect()
    assert [value() for value in values] == [None] * len(values)


def test_states_of_other_positions_are_noticed(models: Models) -> None:
    distill = models.distill()
    student, held = workers_apart(models.config(), distill)
    batch = scored(held, distill, models.batch(), apart=True)
    row, column = batch.tensor("response_mask").nonzero()[0].tolist()
    batch.tensor("response_mask")[row, column] = 0
    with pytest.raises(AssertionError, match="other positions"):
        student.update_actor(batch)


def test_the_logged_divergence_is_without_the_teachers_weights(models: Models) -> None:
    batch, plain, weighed = models.batch(2), models.plain(), models.distill(teachers=2, support="shared")
    even = {"kept": TeacherConfig(path=str(models.frozen), sources=["rec_*"])}
    right = models.expected_loss(plain, batch, DistillConfig("exact", support="shared", teachers=even)).item()
    metrics = workers(models.config(), weighed).update_actor(batch).meta_info["metrics"]
    assert metrics["actor/distill_divergence"] == pytest.approx(right, rel=1e-4)
    assert metrics["actor/distill_loss"] < 0.99 * right, "those rows weigh 0.6"

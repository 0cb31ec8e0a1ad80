"""Each tweak against whole distributions, hand-made advantages, or the batches that it makes."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import MISSING, TEMPERATURE, Models, Plain, over_support, reverse_kl, workers

from experiments.retention.tweaks import LEAK_ADVANTAGE, TWEAKS, upper_half
from verl.config import AlgoConfig, DataConfig, DistillConfig
from verl.ops.linear_divergence import linear_divergence
from verl.protocol import DataProto
from verl.trainer.data import PromptStream
from verl.trainer.ppo.advantage import distillation_advantage
from verl.workers.actor import losses
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")
Divergence = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@pytest.fixture
def distill(models: Models) -> DistillConfig:
    """Rows of places 0 and 2 are general, the others' teacher knows items and weighs 0.6."""
    return models.distill(teachers=2, support="shared")


def trainer_of(student: StudentWorker, **parts: Any) -> Any:
    return SimpleNamespace(actor_wg=SimpleNamespace(_worker=student), **parts)


def gradient_with(tweak: str, models: Models, distill: DistillConfig, **limits: Any) -> dict[str, torch.Tensor]:
    """Of the first update of a student that the tweak was applied to."""
    student = workers(models.config(actor=limits), distill)
    TWEAKS[tweak](trainer_of(student))
    metrics = student.update_actor(models.batch(2)).meta_info["metrics"]
    assert "actor/distill_loss" in metrics
    assert ("distill/sampled_gap" in metrics) == tweak.startswith(("tokens", "prompt")), "it is of the reverse KL alone"
    return tiny.first_gradient(student)


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> torch.Tensor:
    log_p, log_q = over_support(log_p, log_q, size)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> torch.Tensor:
    log_p, log_q = over_support(log_p, log_q, size)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return sum(0.5 * (of.exp() * (of - log_m)).sum(-1) for of in (log_p, log_q))  # type: ignore[return-value]


@pytest.mark.parametrize(("tweak", "of_items"), [("items-forward", forward_kl), ("items-jsd", jsd)])
@pytest.mark.parametrize("limits", [{}, {"ppo_max_token_len_per_gpu": 16}])
def test_rows_of_items_minimise_another_divergence_and_general_rows_the_reverse_kl(
    tweak: str, of_items: Divergence, limits: dict[str, int], models: Models, distill: DistillConfig
) -> None:
    def by_row(log_p: torch.Tensor, log_q: torch.Tensor, size: int) -> torch.Tensor:
        return (reverse_kl if size == models.extend_start else of_items)(log_p, log_q, size)

    plain = models.plain()
    loss = models.expected_loss(plain, models.batch(2), distill, by_row)
    right = tiny.plain_gradient(plain.student, loss)
    tiny.assert_same_gradient(gradient_with(tweak, models, distill, **limits), right)


def whole(models: Models, plain: Plain) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(B, R) trained tokens of general rows and of rows of items; log-probs of the student and of the teachers."""
    batch = models.batch(2)
    trained, is_general = batch.tensor("response_mask").bool(), (batch.tensor("teacher") == 0)[:, None]
    log_p = tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE)
    return trained & is_general, trained & ~is_general, log_p, models.teacher_log_probs(plain, batch)


@pytest.mark.parametrize("tweak", ["tokens-half", "tokens-half-even"])
def test_half_of_the_general_tokens_count_and_divide(tweak: str, models: Models, distill: DistillConfig) -> None:
    plain = models.plain()
    general, of_items, log_p, log_q = whole(models, plain)
    divergence, entropy = reverse_kl(log_p, log_q["base"], models.extend_start), -(log_p.exp() * log_p).sum(-1)
    values = [of[general].tolist() for of in (entropy, divergence)]
    sums = [sum(sorted(of).index(of[token]) for of in values) for token in range(len(values[0]))]
    kept = (len(sums) + 1) // 2
    best = sorted(range(len(sums)), key=sums.__getitem__, reverse=True)
    assert sums[best[kept - 1]] > sums[best[kept]], "this draw has no tie where it matters"
    general_loss = divergence[general][best[:kept]].sum()
    items_loss = 0.6 * reverse_kl(log_p, log_q["full"], models.ids)[of_items].sum()
    if tweak == "tokens-half":
        loss = (general_loss + items_loss) / (kept + int(of_items.sum()))
    else:  # general tokens have the share of the mean that all of them would have
        loss = (general_loss / kept * len(sums) + items_loss) / int((general | of_items).sum())
    right = tiny.plain_gradient(plain.student, loss)
    tiny.assert_same_gradient(gradient_with(tweak, models, distill), right)


def test_the_half_is_of_the_largest_sums_of_ranks() -> None:
    # Ranks 0 1 2 3 4 and 3 0 2 1 4 add up to 3 1 4 4 8.
    entropy, divergence = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([5.0, 1.0, 4.0, 2.0, 9.0])
    assert upper_half(entropy, divergence).tolist() == [False, False, True, True, True]
    assert upper_half(torch.zeros(0), torch.zeros(0)).tolist() == []


def test_forward_kl_is_where_a_teacher_is_uncertain(models: Models, distill: DistillConfig) -> None:
    plain = models.plain()
    general, of_items, log_p, log_q = whole(models, plain)
    entropies = {name: -(log_q[name].exp() * log_q[name]).sum(-1) for name in ("base", "full")}
    ordered = torch.cat([entropies["base"][general], entropies["full"][of_items]]).sort().values
    # A fifth of them lies above this place, whichever way it is rounded.
    threshold = ordered[int(0.8 * (len(ordered) - 1))]
    loss = torch.zeros(())
    for name, mask, size, weight in (("base", general, models.extend_start, 1.0), ("full", of_items, models.ids, 0.6)):
        forward, reverse = (of(log_p, log_q[name], size) for of in (forward_kl, reverse_kl))
        loss = loss + weight * torch.where(entropies[name] > threshold, forward, reverse)[mask].sum()
    loss = loss / len(ordered)
    right = tiny.plain_gradient(plain.student, loss)
    tiny.assert_same_gradient(gradient_with("uncertain-forward", models, distill), right)


@pytest.mark.parametrize("limits", [{}, {"ppo_max_token_len_per_gpu": 16}])
def test_prompts_of_rows_of_items_count_a_quarter(
    limits: dict[str, int], models: Models, distill: DistillConfig
) -> None:
    plain, batch = models.plain(), models.batch(2)
    answers, real = batch.tensor("response_mask"), batch.tensor("attention_mask")
    whole_rows = DataProto.from_dict({**batch.batch, "responses": batch.tensor("input_ids")[:, 1:]})
    factors = torch.nn.functional.pad(answers, (real.shape[1] - 1 - answers.shape[1], 0)).float()
    for row in range(1, len(batch), 2):
        first = int(real[row].argmax())
        factors[row, first : tiny.PROMPT - 1] = 0.25  # of the token after each of these
    assert (factors == 0.25).sum() == 10
    log_p = tiny.plain_log_probs(plain.student, whole_rows, models.ids, TEMPERATURE)
    log_q = models.teacher_log_probs(plain, whole_rows)
    general, of_items = (
        reverse_kl(log_p, log_q["base"], models.extend_start),
        reverse_kl(log_p, log_q["full"], models.ids),
    )
    rows = torch.where(batch.tensor("teacher")[:, None] == 0, general, 0.6 * of_items)
    right = tiny.plain_gradient(plain.student, (rows * factors).sum() / answers.sum())
    tiny.assert_same_gradient(gradient_with("prompt-positions", models, distill, **limits), right)


@pytest.mark.parametrize("tweak", ["tokens-half", "uncertain-forward"])
def test_what_ranks_all_tokens_refuses_a_part_of_them(tweak: str, models: Models, distill: DistillConfig) -> None:
    with pytest.raises(ValueError, match="ranks all of them"):
        gradient_with(tweak, models, distill, ppo_max_token_len_per_gpu=16)
    assert losses.linear_divergence is linear_divergence, "other students of this process are left as they are"


def test_an_item_token_has_a_small_advantage(models: Models) -> None:
    config, bounds = models.config(), {"distill_adv_min_clip": -30.0, "distill_adv_max_clip": 5.0}
    part = partial(distillation_advantage, config=AlgoConfig("on_policy_distill", **bounds))

    def add(task: DataProto, batch: DataProto) -> DataProto:
        return DataProto.from_dict(dict.fromkeys(("advantages", "returns"), part(batch)))

    student = workers(config, DistillConfig())
    student.actor.advantage_part = part
    trainer = trainer_of(student, config=SimpleNamespace(actor_rollout_ref=config), add_distillation=add)
    TWEAKS["leak-penalty"](trainer)

    batch, plain = models.batch(), models.plain()
    lacks = batch.tensor("distill_special_token_mask").bool() & batch.tensor("response_mask").bool()
    drawn = tiny.of_tokens(tiny.plain_log_probs(plain.student, batch, models.ids, TEMPERATURE), batch)
    known = tiny.of_tokens(models.teacher_log_probs(plain, batch)["base"], batch)
    ref = torch.where(batch.tensor("responses") >= models.extend_start, MISSING, known)
    advantages = torch.where(lacks, -1.0, (ref - drawn.detach()).clamp(-30, 5)) * batch.tensor("response_mask")
    assert LEAK_ADVANTAGE == -1.0 and lacks.any() and (advantages[~lacks] < -1.0).any(), "others keep theirs"
    del batch.batch["old_log_probs"], batch.batch["advantages"]
    batch = batch.union(DataProto.from_dict({"ref_log_prob": ref}))
    student.update_actor(batch)
    loss = -(advantages * (drawn - drawn.detach()).exp()).sum() / batch.tensor("response_mask").sum()
    tiny.assert_same_gradient(tiny.first_gradient(student), tiny.plain_gradient(plain.student, loss))
    scored = batch.union(DataProto.from_dict({"old_log_probs": drawn.detach()}))
    logged = trainer.add_distillation(DataProto(), scored).tensor("advantages")
    torch.testing.assert_close(logged, advantages, rtol=0, atol=1e-4)


class Rows(list[dict[str, Any]]):
    """A data set of sources and their number."""

    sources = property(lambda self: [row["source"] for row in self])

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


def test_every_fourth_batch_is_of_items_alone() -> None:
    sources = ["rec_next", "rec_caption", "general_sort"] * 20
    rows = Rows({"source": source, "number": number} for number, source in enumerate(sources))
    weights = {"rec_*": 0.25, "general_*": 0.75}
    config = DataConfig(train_files="none", train_batch_size=8, source_weights=weights, dataloader_num_workers=0)
    prompts = PromptStream(rows, config)  # type: ignore[arg-type]
    TWEAKS["alternate"](SimpleNamespace(prompts=prompts))
    batches = list(islice(prompts.batches(), 2 * prompts.batches_per_epoch))
    assert len(batches) == 14
    kinds = [{str(source).split("_")[0] for source in batch["source"]} for batch in batches]
    assert kinds == [{"rec"} if number % 4 == 3 else {"general"} for number in range(14)], "over epochs too"
    assert all(len(batch["source"]) == 8 for batch in batches)
    first = [int(number) for batch in batches[:7] if "rec_next" in batch["source"] for number in batch["number"]]
    assert len(first) == len(set(first)) > 0, "no row comes again before the others"
    again = PromptStream(rows, config)  # type: ignore[arg-type]
    TWEAKS["alternate"](SimpleNamespace(prompts=again))
    again.load_state_dict({**prompts.state_dict(), "epoch": 0, "batches": 5})
    assert [list(batch["number"]) for batch in islice(again.batches(), 2)] == [list(b["number"]) for b in batches[5:7]]

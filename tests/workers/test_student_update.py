"""The student worker's gradient: against autograd on whole logits, and for every way to cut a batch up.

The gradient is read off Adam's first moment after one step, so everything up to the optimizer takes part.
"""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import MISSING, Models, workers

from verl.config import ActorRolloutRefConfig, AlgoConfig, FSDPConfig
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS = 8


def update(config: ActorRolloutRefConfig, batch: DataProto) -> tuple[StudentWorker, dict[str, float]]:
    """A fresh student after one call."""
    worker = workers(config)
    return worker, worker.update_actor(batch).meta_info["metrics"]


def drawn_batch(models: Models, temperature: float = 1.0) -> DataProto:
    return tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(ROWS, models.ids), models.extend_start, temperature))


def token_losses(log_probs: torch.Tensor, batch: DataProto) -> torch.Tensor:
    """The clipped policy loss (B, R), written down anew: clip range 0.2, dual clip 3."""
    ratio = (log_probs - batch.tensor("old_log_probs")).exp()
    advantages = batch.tensor("advantages")
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * 3.0), losses)


def aggregate(losses: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    rows = mask.any(dim=1)
    sums = (losses * mask).sum(dim=1)[rows]
    if mode == "token-mean":
        return sums.sum() / mask.sum()
    return (sums if mode == "seq-mean-token-sum" else sums / mask.sum(dim=1)[rows]).mean()


def test_every_epoch_takes_every_mini_batch(models: Models) -> None:
    _, metrics = update(models.config(rows_per_step=ROWS // 2, actor={"ppo_epochs": 3}), drawn_batch(models))
    assert metrics["actor/updates"] == 6


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_gradient_is_that_of_the_loss_over_whole_logits(mode: str, models: Models) -> None:
    batch = drawn_batch(models, temperature=1.2)
    batch = batch.union(DataProto.from_dict({"rollout_is_weights": torch.rand_like(batch.tensor("advantages"))}))
    config = models.config(actor={"loss_agg_mode": mode})
    worker, metrics = update(config, batch)
    plain = tiny.load_plain(models.student)
    log_probs = tiny.of_tokens(tiny.plain_log_probs(plain, batch, models.ids, temperature=1.2), batch)
    losses = token_losses(log_probs, batch) * batch.tensor("rollout_is_weights")
    loss = aggregate(losses, batch.tensor("response_mask"), mode)
    right = tiny.plain_gradient(plain, loss)
    tiny.assert_same_gradient(tiny.first_gradient(worker), right)
    assert metrics["actor/pg_loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    norm = torch.stack([value.norm() for value in right.values()]).norm()
    assert metrics["actor/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["actor/lr"] == config.actor.optim.lr


def test_entropy_and_kl_terms(models: Models) -> None:
    batch = drawn_batch(models)
    unknown = batch.tensor("distill_special_token_mask").bool()
    ref = (batch.tensor("old_log_probs") - 0.5).masked_fill(unknown, MISSING)
    batch = batch.union(DataProto.from_dict({"ref_log_prob": ref}))
    terms = {"entropy_coeff": 0.3, "use_kl_loss": True, "kl_loss_coef": 0.7, "kl_loss_type": "k2"}
    worker, metrics = update(models.config(actor=terms), batch)
    plain = tiny.load_plain(models.student)
    distribution = tiny.plain_log_probs(plain, batch, models.ids)
    log_probs, trained = tiny.of_tokens(distribution, batch), batch.tensor("response_mask")
    known = trained * ~unknown  # the stand-in is no log-prob
    assert 0 < known.sum() < trained.sum()
    entropy = aggregate(-(distribution.exp() * distribution).sum(-1), trained, "token-mean")
    kl = aggregate(0.5 * (log_probs - ref).square(), known, "token-mean")
    loss = aggregate(token_losses(log_probs, batch), trained, "token-mean") - 0.3 * entropy + 0.7 * kl
    tiny.assert_same_gradient(tiny.first_gradient(worker), tiny.plain_gradient(plain, loss))
    for name, value in (("loss", loss), ("entropy_loss", entropy), ("kl_loss", kl)):
        assert metrics[f"actor/{name}"] == pytest.approx(float(value.detach()), abs=1e-4)


CUTS = {
    "one micro-batch": ({"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": ROWS}, {}),
    "four micro-batches": ({"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": ROWS // 4}, {}),
    "by tokens": ({"ppo_max_token_len_per_gpu": 20}, {}),
    "padded": ({"ppo_max_token_len_per_gpu": 20}, {"use_remove_padding": False}),
    "no checkpointing": ({}, {"enable_gradient_checkpointing": False}),
    "gathered throughout": ({"fsdp_config": FSDPConfig(reshard_after_forward=False)}, {}),
}


def test_gradient_does_not_depend_on_how_a_batch_is_cut(models: Models) -> None:
    results = {}
    for name, (actor, model) in CUTS.items():
        config = models.config(actor={**actor, "loss_agg_mode": "seq-mean-token-mean"}, model=model)
        worker, metrics = update(config, drawn_batch(models))
        results[name] = tiny.first_gradient(worker), metrics
    gradient, metrics = results.pop("one micro-batch")
    for other_gradient, other_metrics in results.values():
        tiny.assert_same_gradient(other_gradient, gradient)
        assert other_metrics == pytest.approx(metrics, abs=1e-5)


def save_update(config: ActorRolloutRefConfig, algorithm: AlgoConfig, batch: DataProto, folder: Path) -> None:
    """On each rank: train on its share of the rows, and write the gradient and what the pass scored."""
    student = workers(config)
    student.actor.advantage_part = partial(distillation_advantage, config=algorithm)
    scores = student.update_actor(batch.chunk(student.world_size)[student.rank])
    torch.save((tiny.first_gradient(student), scores), folder / f"seen_{student.rank}.pt")


def test_two_ranks_that_score_in_the_update_do_what_one_does_that_scores_before(models: Models, tmp_path: Path) -> None:
    """A reward and three teachers of other weights; the second rank has nothing to train."""
    algorithm = AlgoConfig(distill=models.distill("sampled", 3, coef=0.7), distill_adv_max_clip=0.2)
    config, batch = models.config(actor={"ppo_max_token_len_per_gpu": 24, "entropy_coeff": 0.1}), models.batch(3)
    batch.tensor("response_mask")[ROWS // 2 :] = 0
    batch.rename("old_log_probs", "ref_log_prob")
    tiny.run_ranks(2, save_update, config, algorithm, batch, tmp_path)
    ranks = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
    student = workers(config)
    before = batch.select().union(student.compute_log_prob(batch))
    before.batch["advantages"] = batch.tensor("advantages") + distillation_advantage(before, algorithm)
    assert len(student.update_actor(before)) == 0, "scores that are there already are not returned again"
    tiny.assert_same_gradient(ranks[1][0], tiny.first_gradient(student))
    for key, scores in DataProto.concat([scores for _, scores in ranks]).batch.items():
        torch.testing.assert_close(scores, before.tensor(key) * batch.tensor("response_mask"), rtol=0, atol=1e-5)


def test_later_steps_need_the_scores_of_the_policy_that_wrote(models: Models) -> None:
    batch = drawn_batch(models).select(["responses", "input_ids", "attention_mask", "response_mask", "advantages"])
    for epochs, rows in ((2, ROWS), (1, ROWS // 2)):
        with pytest.raises(KeyError, match=r"old_log_probs.*made by: student"):
            update(models.config(rows_per_step=rows, actor={"ppo_epochs": epochs}), batch)


# One row per case of DESIGN section 4: p prompt, a b c d ordinary tokens, E an extended one.
def extended_batch(extend_start: int) -> DataProto:
    e = extend_start
    rows = [
        ([5, 6, 7], [20, 21, e + 2, 30, 31]),  # t* = 2, then two tokens in a void context
        ([8, 9], [e, 40, e + 1]),  # t* = 0
        ([10, 11, 12], [50, 51, 52, 53]),  # no extended token
        ([13, e + 3], [60, e + 4]),  # extended ids in the prompt, t* last
    ]
    return tiny.with_loss_inputs(tiny.rollouts(rows, extend_start))


def test_nothing_after_the_first_extended_token_has_a_gradient(models: Models) -> None:
    """Whatever stands after t* (advantages, old log-probs, the tokens themselves), the gradient is the same."""
    batch, config = extended_batch(models.extend_start), models.config(rows_per_step=4)
    trained = batch.tensor("response_mask").bool()
    assert trained.tolist()[:2] == [[True] * 3 + [False] * 5, [True] + [False] * 7]
    gradient = tiny.first_gradient(update(config, batch)[0])
    other = copy.deepcopy(batch)
    after = ~trained & other.tensor("attention_mask")[:, -trained.shape[1] :].bool()
    assert after.sum() == 4
    other.tensor("advantages")[~trained] = 1e6
    other.tensor("old_log_probs")[~trained] = float("-inf")
    other.tensor("responses")[after] = 77
    other.tensor("input_ids")[:, -trained.shape[1] :][after] = 77
    tiny.assert_same_gradient(tiny.first_gradient(update(config, other)[0]), gradient)


def test_a_mini_batch_without_trained_tokens_changes_nothing(models: Models) -> None:
    batch = extended_batch(models.extend_start)
    batch.tensor("response_mask").zero_()
    worker, metrics = update(models.config(rows_per_step=4), batch)
    assert not any(value.any() for value in tiny.first_gradient(worker).values())
    assert (metrics["actor/updates"], metrics["actor/skipped_updates"]) == (0, 0), "nothing to learn is no fault"
    assert worker.actor.optimizer_steps == 1, "of the schedule of learning rates it is a step"
    assert all(value == value for value in metrics.values())  # no NaN
    plain = dict(tiny.load_plain(models.student).named_parameters())
    assert all(torch.equal(value, plain[name]) for name, value in tiny.weights_of(worker).items())

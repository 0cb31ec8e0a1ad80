"""Advantages, losses and KL terms against numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.config import AlgoConfig, FSDPActorConfig, KLControlConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import (
    AdvantageEstimator,
    agg_loss,
    compute_grpo_outcome_advantage,
    compute_on_policy_distill_reverse_kl,
    compute_policy_loss_vanilla,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_rloo_outcome_advantage,
    count_trained,
    get_adv_estimator_fn,
    kl_penalty,
    register_adv_est,
)

NAN = float("nan")
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def close(actual: torch.Tensor, expected: list, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


# ---------------------------------------------------------------- on-policy distillation

# teacher - student:   -2-(-1) = -1   -1-(-2) = 1   -100-(-3) = -97   masked
STUDENT = torch.tensor([[-1.0, -2.0, -3.0, NAN]])
TEACHER = torch.tensor([[-2.0, -1.0, -100.0, -5.0]])
TRAINED = torch.tensor([[1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (None, None, [-1.0, 1.0, -97.0, 0.0]),
        (-30.0, 5.0, [-1.0, 1.0, -30.0, 0.0]),
        (0.0, None, [0.0, 1.0, 0.0, 0.0]),
        (-30.0, -2.0, [-2.0, -2.0, -30.0, 0.0]),  # a negative upper bound never reaches the masked position
    ],
)
def test_distillation_advantage_is_the_clipped_log_ratio(
    low: float | None, high: float | None, expected: list[float]
) -> None:
    bounds = {"distill_adv_min_clip": low, "distill_adv_max_clip": high}
    for options in ({"config": AlgoConfig(**bounds)}, bounds):
        advantages, returns = compute_on_policy_distill_reverse_kl(STUDENT, TEACHER, TRAINED, **options)
        close(advantages, [expected])
        close(returns, [expected])


def test_a_bound_given_as_argument_goes_before_the_config() -> None:
    config = AlgoConfig(distill_adv_min_clip=-30.0, distill_adv_max_clip=5.0)
    advantages, _ = compute_on_policy_distill_reverse_kl(STUDENT, TEACHER, TRAINED, config, distill_adv_max_clip=0.0)
    close(advantages, [[-1.0, 0.0, -30.0, 0.0]])
    with pytest.raises(ValueError, match=r"distill_adv_min_clip=-30.*distill_adv_max_clip=-40"):
        compute_on_policy_distill_reverse_kl(STUDENT, TEACHER, TRAINED, config, distill_adv_max_clip=-40.0)


def test_low_precision_log_probs_are_subtracted_in_float32() -> None:
    teacher = torch.tensor([[-1.01, -2.0, -3.0, 0.0]])
    advantages, _ = compute_on_policy_distill_reverse_kl(STUDENT.bfloat16(), teacher, TRAINED)
    assert advantages.dtype == torch.float32
    close(advantages, [[-0.01, 0.0, 0.0, 0.0]])


# ---------------------------------------------------------------- advantages from task rewards

GROUPS = np.array(["a", "b", "a", "c", "a"], dtype=object)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]])


def rewards_of(*scores: float) -> torch.Tensor:
    """Each score at the last of three tokens, trained or not."""
    return torch.tensor([[0.0, 0.0, score] for score in scores])


def test_grpo_compares_with_the_group_mean_in_units_of_its_deviation() -> None:
    # Group a: 1, 3, 8: mean 4, deviations -3, -1, 4, unbiased variance (9 + 1 + 16) / 2 = 13, std 3.6055513.
    # b and c are alone: no baseline, no scale; c trains nothing.
    low, middle, high = (deviation / (math.sqrt(13) + 1e-6) for deviation in (-3, -1, 4))
    scaled = [[low, low, 0], [5 / (1 + 1e-6), 0, 0], [middle] * 3, [0, 0, 0], [0, high, 0]]
    plain = [[-3, -3, 0], [5, 0, 0], [-1, -1, -1], [0, 0, 0], [0, 4, 0]]
    for by_std, expected in ((True, scaled), (False, plain)):
        for values in compute_grpo_outcome_advantage(
            rewards_of(1, 5, 3, 7, 8), MASK, GROUPS, norm_adv_by_std_in_grpo=by_std
        ):
            close(values, expected)
    agreeing, _ = compute_grpo_outcome_advantage(rewards_of(2, 2), MASK[:2], np.array([7, 7], dtype=object))
    close(agreeing, [[0, 0, 0], [0, 0, 0]], atol=0)


@pytest.mark.parametrize("size", range(3, 17))
@pytest.mark.parametrize("reward", [0.1, 0.7, 0.9, -3.3, 9.7, 99.9, 1000.1])
def test_equal_rewards_have_advantages_of_exactly_zero_and_almost_equal_ones_their_own(
    reward: float, size: int
) -> None:
    rewards, mask = rewards_of(*[reward] * size), torch.ones(size, 3, dtype=torch.int64)
    for estimate in (compute_grpo_outcome_advantage, compute_rloo_outcome_advantage):
        close(estimate(rewards, mask, np.zeros(size, dtype=object))[0], [[0, 0, 0]] * size, atol=0)
    close(compute_reinforce_plus_plus_outcome_advantage(rewards, mask)[0], [[0, 0, 0]] * size, atol=0)
    scores = rewards[:, 2].numpy() + np.float32(reward * 1e-6) * np.arange(size, dtype=np.float32)
    right = (scores.astype(np.float64) - scores.mean(dtype=np.float64)) / (scores.std(ddof=1, dtype=np.float64) + 1e-6)
    found = compute_grpo_outcome_advantage(rewards_of(*scores.tolist()), mask, np.zeros(size, dtype=object))[0]
    close(found[:, 0], right.tolist())


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # Group a: 1 - (3 + 8) / 2 = -4.5, 3 - (1 + 8) / 2 = -1.5, 8 - (1 + 3) / 2 = 6; b is alone: 5.
    advantages, _ = compute_rloo_outcome_advantage(rewards_of(1, 5, 3, 7, 8), MASK, GROUPS)
    close(advantages, [[-4.5, -4.5, 0], [5, 0, 0], [-1.5, -1.5, -1.5], [0, 0, 0], [0, 6, 0]])


def test_reinforce_plus_plus_discounts_over_trained_tokens_and_whitens() -> None:
    # Row 0: 1 at the end, gamma 1/2: returns 0.25, 0.5, 1.
    # Row 1: 2 at the end, a tool token between: it passes the return on undiscounted: 1, -, 2.
    # Whitened over 0.25, 0.5, 1, 1, 2: mean 0.95, squared deviations sum to 1.8, / 4 = 0.45, std 0.6708204.
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    advantages, returns = compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config=AlgoConfig(gamma=0.5))
    close(returns, [[0.25, 0.5, 1.0], [1.0, 0.0, 2.0]])
    close(advantages, [[-1.0434984, -0.6708204, 0.0745356], [0.0745356, 0.0, 1.5652476]], atol=1e-5)


def test_reinforce_plus_plus_includes_a_reward_after_the_last_trained_token() -> None:
    # The answer leaked at its second token; the reward is at its end.
    _, returns = compute_reinforce_plus_plus_outcome_advantage(rewards_of(3), torch.tensor([[1, 1, 0]]))
    close(returns, [[3, 3, 0]])
    # Fewer than two tokens have no deviation to divide by.
    advantages, _ = compute_reinforce_plus_plus_outcome_advantage(rewards_of(3), torch.tensor([[0, 1, 0]]))
    close(advantages, [[0, 0, 0]], atol=0)


def test_reinforce_plus_plus_with_a_baseline_whitens_what_is_left_of_the_groups_mean() -> None:
    # Group a: 1, 3, 8 less 4: -3 (2 tokens), -1 (3 tokens), 4 (1 token); b is alone: 5 (1 token). Mean 0 over the 7
    # tokens, squares 2 x 9 + 3 + 16 + 25 = 62, / 6, std 3.2145503.
    rewards, std = rewards_of(1, 5, 3, 7, 8), math.sqrt(62 / 6)
    advantages, returns = compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, MASK, GROUPS)
    expected = [[-3, -3, 0], [5, 0, 0], [-1, -1, -1], [0, 0, 0], [0, 4, 0]]
    close(advantages * std, expected, atol=1e-5)
    close(returns * std, expected, atol=1e-5)


# ---------------------------------------------------------------- registry


def test_estimators_are_registered_once_by_name_and_enum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_adv_estimator_fn("on_policy_distill") is compute_on_policy_distill_reverse_kl
    assert get_adv_estimator_fn(AdvantageEstimator.GRPO) is compute_grpo_outcome_advantage
    with pytest.raises(ValueError, match=r"gae is unknown; choose from .*grpo.*on_policy_distill"):
        get_adv_estimator_fn("gae")
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", {})
    first = register_adv_est("mine")(lambda: None)
    assert register_adv_est("mine")(first) is first
    with pytest.raises(ValueError, match="'mine' exists"):
        register_adv_est("mine")(lambda: None)


# ---------------------------------------------------------------- aggregation

LOSSES = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN]])
LOSS_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 7 / 3),  # (1 + 2 + 4) / 3 tokens
        ("seq-mean-token-sum", 3.5),  # (3 + 4) / 2 sequences; the third has nothing to train
        ("seq-mean-token-sum-norm", 3.5 / 3),  # over R = 3
        ("seq-mean-token-mean", 2.75),  # (1.5 + 4) / 2
    ],
)
def test_aggregation_by_hand(mode: str, expected: float) -> None:
    assert agg_loss(LOSSES, LOSS_MASK, mode).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cuts", [[8], [1, 3, 2, 2], [1] * 8])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_shares_of_ranks_and_micro_batches_add_up_to_the_whole(mode: str, cuts: list[int], dp_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(8 * dp_size, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(8 * dp_size, 5, generator=generator) < 0.5).long()
    mask[0] = 0  # one micro-batch of [1] * 8 trains nothing
    whole = agg_loss(losses, mask, mode)
    (whole_grad,) = torch.autograd.grad(whole, losses)

    tokens, sequences = count_trained(mask)
    ranks = []
    for rank_losses, rank_mask in zip(losses.chunk(dp_size), mask.chunk(dp_size), strict=True):
        pieces = zip(rank_losses.split(cuts), rank_mask.split(cuts), strict=True)
        ranks.append(sum(agg_loss(loss, part, mode, dp_size, int(tokens), int(sequences)) for loss, part in pieces))
    averaged = sum(ranks) / dp_size  # what data-parallel training does to gradients
    torch.testing.assert_close(averaged, whole)
    (grad,) = torch.autograd.grad(averaged, losses)
    torch.testing.assert_close(grad, whole_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(None, None), (torch.tensor(0), torch.tensor(0))])
def test_nothing_to_train_is_zero_with_zero_gradient(mode: str, counts: tuple) -> None:
    losses = torch.tensor([[NAN, 1.0]], requires_grad=True)
    loss = agg_loss(losses, torch.zeros(1, 2), mode, 1, *counts)
    assert loss.item() == 0.0
    close(torch.autograd.grad(loss, losses)[0], [[0, 0]], atol=0)


def test_aggregations_that_cannot_be_computed_are_refused() -> None:
    for mode in MODES:
        with pytest.raises(ValueError, match=r"needs (batch_num_tokens|global_batch_size) over all ranks"):
            agg_loss(LOSSES, LOSS_MASK, mode, dp_size=2)
    with pytest.raises(ValueError, match="'mean' is not one of token-mean"):
        agg_loss(LOSSES, LOSS_MASK, "mean")


# ---------------------------------------------------------------- policy loss

CLIP = FSDPActorConfig(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0)
# token   A   ratio  -A r  -A clip(r)  max    dual clip   loss
#   0    +1   1.5    -1.5    -1.3     -1.3                -1.3   clipped
#   1    +1   0.5    -0.5    -0.8     -0.5                -0.5
#   2    -1   5.0     5.0     1.3      5.0   at most 3.0   3.0   dual-clipped
#   3    -1   0.5     0.5     0.8      0.8                 0.8   clipped
#   4   masked
ADVANTAGES = torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]])
NEW = torch.tensor([[1.5, 0.5, 5.0, 0.5, NAN]]).log()
OLD = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1000.0]])
FIVE = torch.tensor([[1, 1, 1, 1, 0]])


def test_policy_loss_clips_both_ways_and_doubly() -> None:
    loss, metrics = compute_policy_loss_vanilla(OLD, NEW, ADVANTAGES, FIVE, "token-mean", CLIP)
    assert loss.item() == pytest.approx(0.5)  # (-1.3 - 0.5 + 3.0 + 0.8) / 4
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(0.5)  # tokens 0 and 3
    assert metrics["actor/pg_clipfrac_lower"].item() == pytest.approx(0.25)  # token 2
    # -(ln 1.5 + ln 0.5 + ln 5 + ln 0.5) / 4
    assert metrics["actor/ppo_kl"].item() == pytest.approx(-0.1571523, abs=1e-6)


def test_policy_gradient_on_policy_is_the_advantage_and_stops_at_the_mask() -> None:
    # d/dlogp of -A exp(logp - old) at logp = old is -A; each of 4 tokens counts 1/4. Nothing past the mask, whatever
    # its value.
    for beyond in (NAN, 1000.0, float("inf")):
        log_prob = torch.tensor([[-1.0, -2.0, -3.0, -4.0, beyond]], requires_grad=True)
        old = torch.tensor([[-1.0, -2.0, -3.0, -4.0, 0.0]])
        advantages = torch.tensor([[1.0, 2.0, -3.0, 0.0, NAN]])
        loss, _ = compute_policy_loss_vanilla(old, log_prob, advantages, FIVE, "token-mean", CLIP)
        close(torch.autograd.grad(loss, log_prob)[0], [[-0.25, -0.5, 0.75, 0.0, 0.0]])


def test_importance_weights_scale_each_token() -> None:
    weights = torch.tensor([[2.0, 1.0, 1.0, 0.5, NAN]])
    loss, _ = compute_policy_loss_vanilla(OLD, NEW, ADVANTAGES, FIVE, "token-mean", CLIP, weights)
    assert loss.item() == pytest.approx((-2.6 - 0.5 + 3.0 + 0.4) / 4)


def test_policy_loss_and_metrics_of_shares_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    old, new, advantages = torch.randn(3, 4, 6, generator=generator)
    mask = (torch.rand(4, 6, generator=generator) < 0.6).long()
    tokens, sequences = count_trained(mask)
    for mode in MODES:
        loss, metrics = compute_policy_loss_vanilla(old, new, advantages, mask, mode, CLIP)
        shares = [
            compute_policy_loss_vanilla(
                old[row], new[row], advantages[row], mask[row], mode, CLIP, None, 2, tokens, sequences
            )
            for row in ([0], [1, 2], [3])
        ]
        assert sum(share.item() for share, _ in shares) / 2 == pytest.approx(loss.item(), rel=1e-5)
        for key, value in metrics.items():
            assert sum(more[key].item() for _, more in shares) / 2 == pytest.approx(value.item(), rel=1e-5)


def test_an_exploded_ratio_stays_finite() -> None:
    loss, metrics = compute_policy_loss_vanilla(
        torch.tensor([[-200.0]]), torch.tensor([[0.0]]), torch.tensor([[-1.0]]), torch.ones(1, 1), config=CLIP
    )
    assert loss.item() == pytest.approx(3.0)  # the dual clip
    assert metrics["actor/ppo_kl"].item() == pytest.approx(-20.0)


def test_a_policy_loss_needs_its_clip_bounds() -> None:
    for config in (None, SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=None, clip_ratio_c=3.0)):
        with pytest.raises(ValueError, match="clip_ratio_high"):
            compute_policy_loss_vanilla(OLD, NEW, ADVANTAGES, FIVE, "token-mean", config)


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # d = logprob - ref = 1 and -1
        (("kl", "k1"), [1.0, -1.0]),
        (("abs",), [1.0, 1.0]),
        (("mse", "k2"), [0.5, 0.5]),
        (("low_var_kl", "k3"), [0.36787944, 0.71828183]),  # e^-1 + 1 - 1 and e - 1 - 1
    ],
)
def test_kl_estimators_by_hand(names: tuple[str, ...], expected: list[float]) -> None:
    for name in names:
        close(kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), name), expected)


def test_k3_is_bounded_and_full_is_refused() -> None:
    close(kl_penalty(torch.tensor([-1000.0]), torch.tensor([0.0]), "k3"), [10.0])
    for name, reason in (("full", "whole distribution"), ("k4", "unknown")):
        with pytest.raises(ValueError, match=reason):
            kl_penalty(torch.zeros(1), torch.zeros(1), name)


def test_kl_controllers() -> None:
    fixed = core_algos.get_kl_controller(KLControlConfig(type="fixed", kl_coef=0.1))
    fixed.update(current_kl=5.0, n_steps=10)
    assert fixed.value == 0.1
    adaptive = core_algos.get_kl_controller(KLControlConfig(type="adaptive", kl_coef=0.1, target_kl=1.0, horizon=100))
    adaptive.update(current_kl=2.0, n_steps=10)  # error clipped to 0.2: 0.1 * (1 + 0.2 * 10 / 100)
    assert adaptive.value == pytest.approx(0.102)
    adaptive.update(current_kl=0.9, n_steps=10)  # error -0.1: 0.102 * (1 - 0.1 * 10 / 100)
    assert adaptive.value == pytest.approx(0.10098)
    adaptive.update(current_kl=0.0, n_steps=1000)
    assert adaptive.value == pytest.approx(0.8 * 0.10098), "never negative"

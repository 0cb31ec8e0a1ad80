"""The algorithm: advantages, losses and KL terms. Tensors in, tensors out.

In:  log-probs, rewards, masks, group ids. Out: advantages and returns (B, R), or a scalar loss and its metrics.
Not here: models, batches as objects, communication between ranks. A caller with several ranks or micro-batches passes
the counts of the whole mini-batch (`count_trained`, summed over all of them) and gets shares that add up.

Letters: B sequences, R response tokens.

A mask is 1 at trained tokens and 0 elsewhere. Values at masked positions never matter, NaN and infinity
included: they are replaced, not multiplied by zero.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from verl.trainer.ppo.kl_control import AdaptiveKLController as AdaptiveKLController
from verl.trainer.ppo.kl_control import FixedKLController as FixedKLController
from verl.trainer.ppo.kl_control import get_kl_controller as get_kl_controller
from verl.utils.torch_functional import masked_whiten, zero_outside_mask

if TYPE_CHECKING:
    from verl.config.algorithm import AlgoConfig

AdvantageFn = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""An advantage estimator: named inputs to (advantages, returns), both (B, R)."""

Count = int | float | torch.Tensor
"""A number of tokens or sequences."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within this before ``exp``: e^20 and its products stay finite in float32 and bfloat16."""


class PolicyLossConfig(Protocol):
    """The part of the actor's settings that the policy loss reads."""

    clip_ratio_low: float | None
    clip_ratio_high: float | None
    clip_ratio_c: float


class AdvantageEstimator(StrEnum):
    """Names of the built-in advantage estimators."""

    ON_POLICY_DISTILL = "on_policy_distill"
    GRPO = "grpo"
    RLOO = "rloo"
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"


ADV_ESTIMATOR_REGISTRY: dict[str, AdvantageFn] = {}


def register_adv_est(name_or_enum: str | AdvantageEstimator) -> Callable[[AdvantageFn], AdvantageFn]:
    """Decorator that makes an estimator available as ``algorithm.adv_estimator``.

    Raises:
        ValueError: another function has that name.
    """
    name = str(name_or_enum)

    def register(fn: AdvantageFn) -> AdvantageFn:
        if ADV_ESTIMATOR_REGISTRY.get(name, fn) is not fn:
            raise ValueError(f"advantage estimator {name!r} exists already; choose another name")
        ADV_ESTIMATOR_REGISTRY[name] = fn
        return fn

    return register


def get_adv_estimator_fn(name_or_enum: str | AdvantageEstimator) -> AdvantageFn:
    """The estimator of that name.

    Raises:
        ValueError: no such estimator; the message lists the known ones.
    """
    name = str(name_or_enum)
    if name not in ADV_ESTIMATOR_REGISTRY:
        known = ", ".join(sorted(ADV_ESTIMATOR_REGISTRY))
        raise ValueError(f"algorithm.adv_estimator={name!r} is unknown; choose from {known}")
    return ADV_ESTIMATOR_REGISTRY[name]


@register_adv_est(AdvantageEstimator.ON_POLICY_DISTILL)
def compute_on_policy_distill_reverse_kl(
    old_log_probs: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    config: "AlgoConfig | None" = None,
    distill_adv_max_clip: float | None = None,
    distill_adv_min_clip: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of on-policy distillation: the clipped negative reverse-KL term of each token.

    The reverse KL(student || teacher) is the mean of ``log p_student(y) - log p_teacher(y)`` over tokens y that the
    student sampled; a token is worth more, the more the teacher prefers it:
    ``A_t = clip(-(old_log_probs_t - ref_log_prob_t), min, max)`` at trained tokens, 0 elsewhere.

    Args:
        old_log_probs: (B, R) the student's log-probs of its tokens, in nats.
        ref_log_prob: (B, R) the teacher's, at the same temperature.
        response_mask: (B, R) 1 at trained tokens.
        config: gives the bounds that the two arguments below leave open.
        distill_adv_max_clip: upper bound; 0 is a bound, None is none.
        distill_adv_min_clip: lower bound; 0 is a bound, None is none.

    Returns:
        advantages and returns, (B, R) float32, equal: nothing is discounted and there is no baseline.

    Raises:
        ValueError: the lower bound is above the upper one.
    """
    if config is not None:
        distill_adv_max_clip = config.distill_adv_max_clip if distill_adv_max_clip is None else distill_adv_max_clip
        distill_adv_min_clip = config.distill_adv_min_clip if distill_adv_min_clip is None else distill_adv_min_clip
    low, high = distill_adv_min_clip, distill_adv_max_clip
    if low is not None and high is not None and low > high:
        raise ValueError(f"distill_adv_min_clip={low} is above distill_adv_max_clip={high}; swap them")
    advantages = ref_log_prob.float() - old_log_probs.float()
    if low is not None or high is not None:
        advantages = advantages.clamp(min=low, max=high)
    advantages = zero_outside_mask(advantages, response_mask)
    return advantages, advantages.clone()


def _group_sizes(index: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Group number of each row (B,), and the rows of each group (G,)."""
    _, inverse, counts = np.unique(np.asarray(index).astype(str), return_inverse=True, return_counts=True)
    return torch.as_tensor(inverse, device=device), torch.as_tensor(counts, device=device)


def _group_sum(scores: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    return torch.zeros(num_groups, dtype=scores.dtype, device=scores.device).index_add_(0, group, scores)


def _spread(scores: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One number a sequence (B,), as advantages and returns at its trained tokens (B, R)."""
    advantages = zero_outside_mask(scores.unsqueeze(-1).expand(response_mask.shape), response_mask)
    return advantages, advantages.clone()


@register_adv_est(AdvantageEstimator.GRPO)
def compute_grpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: "AlgoConfig | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO (arXiv:2402.03300): a sequence's reward against the mean of its prompt's group.

    ``A = (s - mean) / (std + epsilon)`` with the unbiased standard deviation, or ``s - mean`` (Dr. GRPO,
    arXiv:2503.20783) without the division. A group of one has no baseline: ``A = s``.

    Args:
        token_level_rewards: (B, R); their sum over a row is the sequence's reward, whatever the mask.
        response_mask: (B, R) 1 at trained tokens.
        index: (B,) group id of each row.
        norm_adv_by_std_in_grpo: divide by the group's standard deviation.

    Returns:
        advantages and returns (B, R): the same number at every trained token of a row.
    """
    scores = token_level_rewards.float().sum(dim=-1)
    group, counts = _group_sizes(index, scores.device)
    mean = _group_sum(scores, group, len(counts)) / counts
    mean = torch.where(counts > 1, mean, 0.0)
    centred = scores - mean[group]
    if norm_adv_by_std_in_grpo:
        variance = _group_sum(centred**2, group, len(counts)) / (counts - 1).clamp(min=1)
        std = torch.where(counts > 1, variance.sqrt(), 1.0)
        centred = centred / (std[group] + epsilon)
    return _spread(centred, response_mask)


@register_adv_est(AdvantageEstimator.RLOO)
def compute_rloo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: "AlgoConfig | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RLOO (arXiv:2402.14740): a sequence's reward less the mean of the OTHERS of its prompt's group.

    A group of one has no baseline: ``A = s``. Arguments and results as `compute_grpo_outcome_advantage`;
    ``epsilon`` is there for the common signature and divides nothing.
    """
    scores = token_level_rewards.float().sum(dim=-1)
    group, counts = _group_sizes(index, scores.device)
    others_sum = _group_sum(scores, group, len(counts))[group] - scores
    others = (counts[group] - 1).clamp(min=1)
    baseline = torch.where(counts[group] > 1, others_sum / others, 0.0)
    return _spread(scores - baseline, response_mask)


@register_adv_est(AdvantageEstimator.REINFORCE_PLUS_PLUS)
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: "AlgoConfig | None" = None,
    gamma: float = 1.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ (arXiv:2501.03262): discounted returns, whitened over all trained tokens of the batch.

    ``G_t = sum over k >= t of gamma^(trained tokens in (t, k]) r_k``: returns pass unchanged through tokens that are
    not trained (tool turns), so an early turn sees the reward of the last one.

    Args:
        token_level_rewards: (B, R); rewards at untrained tokens count towards the trained ones before them.
        response_mask: (B, R) 1 at trained tokens.
        config: its ``gamma`` goes before the argument.
        gamma: discount per trained token.

    Returns:
        advantages (B, R), mean 0 and standard deviation 1 over trained tokens (0 where there are fewer than two);
        returns (B, R) before whitening.
    """
    gamma = gamma if config is None else config.gamma
    rewards, trained = token_level_rewards.float(), response_mask.bool()
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + running
        returns[:, t] = running
        running = torch.where(trained[:, t], gamma * running, running)
    returns = zero_outside_mask(returns, response_mask)
    return masked_whiten(returns, response_mask), returns


def count_trained(loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained tokens, and sequences with at least one of them, as 0-dim int64 tensors.

    Summed over all micro-batches and ranks of a mini-batch they are `agg_loss`'s ``batch_num_tokens`` and
    ``global_batch_size``.
    """
    trained = loss_mask.bool()
    return trained.sum(), trained.any(dim=-1).sum()


def _at_least_one(count: Count) -> Count:
    """A denominator: a count of nothing stands under a sum of nothing, which must give 0 and not NaN."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
) -> torch.Tensor:
    """Token losses as one number.

    - ``token-mean``: sum over trained tokens / number of trained tokens.
    - ``seq-mean-token-sum``: the sum of each sequence, mean over sequences with a trained token.
    - ``seq-mean-token-mean``: the mean of each sequence, mean over sequences with a trained token.

    With the counts of the whole mini-batch (`count_trained`) the results of all micro-batches and ranks, added up and
    divided by ``dp_size`` (data-parallel training averages gradients over ranks), are the value of the whole
    mini-batch in one piece. Without counts they are taken from ``loss_mask``.

    Args:
        loss_mat: (B, R) loss of each token.
        loss_mask: (B, R) 1 at trained tokens; anything may stand in ``loss_mat`` elsewhere.
        loss_agg_mode: one of the three above.
        dp_size: ranks whose gradients are averaged.
        batch_num_tokens: trained tokens of the whole mini-batch over all ranks.
        global_batch_size: sequences with a trained token, likewise.

    Returns:
        0-dim tensor; 0 where nothing is trained.

    Raises:
        ValueError: unknown mode, or several ranks without the count that the mode divides by.
    """
    losses, trained = zero_outside_mask(loss_mat, loss_mask), loss_mask.bool()
    local_tokens, local_sequences = count_trained(loss_mask)
    if loss_agg_mode == "token-mean":
        total, given, local, name = losses.sum(), batch_num_tokens, local_tokens, "batch_num_tokens"
    elif loss_agg_mode in ("seq-mean-token-sum", "seq-mean-token-mean"):
        per_sequence = losses.sum(dim=-1)
        if loss_agg_mode == "seq-mean-token-mean":
            per_sequence = per_sequence / trained.sum(dim=-1).clamp(min=1)
        total, given, local, name = per_sequence.sum(), global_batch_size, local_sequences, "global_batch_size"
    else:
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode!r} is not one of token-mean, seq-mean-token-sum, seq-mean-token-mean"
        )
    if given is None and dp_size > 1:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} with dp_size={dp_size} needs {name} over all ranks")
    return total / _at_least_one(local if given is None else given) * dp_size


def compute_policy_loss_vanilla(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: PolicyLossConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss of PPO (arXiv:1707.06347) with dual clip (arXiv:1912.09729).

    With ratio r = exp(log_prob - old_log_prob) the token loss is ``max(-A r, -A clip(r, 1 - low, 1 + high))``, and for
    A < 0 at most ``-A c``.

    Args:
        old_log_prob, advantages: (B, R) log-probs of the policy that the advantages belong to, and these.
        log_prob: (B, R) of the policy that is trained; gradients flow here.
        response_mask: (B, R) 1 at trained tokens.
        loss_agg_mode: see `agg_loss`, which also explains the last three arguments.
        config: clip_ratio_low, clip_ratio_high, clip_ratio_c.
        rollout_is_weights: (B, R) weight of each token, or None for 1.

    Returns:
        the loss, and detached 0-dim metrics that aggregate over micro-batches and ranks as the loss does, each a mean
        over trained tokens: ``actor/pg_clipfrac`` and ``actor/pg_clipfrac_lower`` (shares of tokens that the clip and
        the dual clip bind), ``actor/ppo_kl`` (k1 estimate of KL(old || new)).

    Raises:
        ValueError: no config, a missing clip bound, clip_ratio_c not above 1, or one of the two counts alone.
    """
    if config is None or config.clip_ratio_low is None or config.clip_ratio_high is None:
        raise ValueError("the policy loss needs a config with actor.clip_ratio_low and actor.clip_ratio_high")
    if config.clip_ratio_c <= 1.0:
        raise ValueError(f"actor.clip_ratio_c={config.clip_ratio_c} must be above 1")
    if (batch_num_tokens is None) != (global_batch_size is None):
        raise ValueError("give batch_num_tokens and global_batch_size together, or neither")
    # Selected before exp: an infinite ratio at a masked token would turn the gradient of `where` into 0 * inf = NaN.
    log_ratio = zero_outside_mask(log_prob - old_log_prob, response_mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = zero_outside_mask(advantages, response_mask)
    bounds = (1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    losses, is_clipped, is_capped = _clipped_losses(log_ratio.exp(), advantages, bounds, config.clip_ratio_c)
    if rollout_is_weights is not None:
        losses = losses * zero_outside_mask(rollout_is_weights, response_mask)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return agg_loss(values.detach(), response_mask, "token-mean", dp_size, batch_num_tokens)

    metrics = {
        "actor/pg_clipfrac": mean(is_clipped.float()),
        "actor/pg_clipfrac_lower": mean(is_capped.float()),
        "actor/ppo_kl": mean(-log_ratio),
    }
    loss = agg_loss(losses, response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size)
    return loss, metrics


def _clipped_losses(
    ratio: torch.Tensor, advantages: torch.Tensor, bounds: tuple[float, float], cap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token losses, where the clip binds, and where the dual clip does; all of the shape of ``ratio``."""
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(*bounds)
    pessimistic, ceiling = torch.maximum(unclipped, clipped), -advantages * cap
    is_capped = (pessimistic > ceiling) & (advantages < 0)
    return torch.where(is_capped, ceiling, pessimistic), clipped > unclipped, is_capped


def kl_penalty(logprob: torch.Tensor, ref_logprob: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from the log-probs of sampled tokens.

    With d = logprob - ref_logprob: ``kl`` / ``k1`` is d, ``abs`` |d|, ``mse`` / ``k2`` d^2 / 2, ``low_var_kl`` / ``k3``
    e^-d + d - 1, held within [-10, 10] (http://joschu.net/blog/kl-approx.html).

    Args:
        logprob: (...) log-probs of the policy.
        ref_logprob: (...) log-probs of the reference.
        kl_penalty: one of the names above.

    Raises:
        ValueError: another name; ``full`` needs whole distributions, which are never materialised.
    """
    difference = logprob - ref_logprob
    match kl_penalty:
        case "kl" | "k1":
            return difference
        case "abs":
            return difference.abs()
        case "mse" | "k2":
            return 0.5 * difference.square()
        case "low_var_kl" | "k3":
            negative = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            return (negative.exp() - negative - 1).clamp(-10.0, 10.0)
    reason = "needs the whole distribution" if kl_penalty == "full" else "is unknown"
    raise ValueError(f"kl_penalty={kl_penalty!r} {reason}; choose from kl (k1), abs, mse (k2), low_var_kl (k3)")

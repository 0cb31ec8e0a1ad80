"""Advantage estimators: from log-probs or rewards to the advantage of each token. Tensors in, tensors out.

In:  log-probs, rewards, masks, group ids. Out: advantages and returns (B, R). ``register_adv_est`` adds an estimator.
The weight of the KL penalty in the reward, fixed or adaptive, is here too.
Not here: batches as objects (``advantage``), the losses that follow an advantage (``verl.ops.policy_loss``; their names
can be imported from here, as in verl).

Letters: B sequences, R response tokens.

A mask is 1 at trained tokens and 0 elsewhere. Values at masked positions never matter, NaN and infinity
included: they are replaced, not multiplied by zero.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from verl.config.algorithm import AdvantageEstimator, AlgoConfig, KLControlConfig
from verl.ops.policy_loss import (  # noqa: F401 (verl has them here)
    agg_loss,
    compute_policy_loss_vanilla,
    count_trained,
    kl_penalty,
    zero_outside_mask,
)
from verl.protocol import BATCH_KEYS
from verl.utils.torch_functional import masked_whiten

AdvantageFn = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""An advantage estimator: named inputs to (advantages, returns), both (B, R)."""


ADV_ESTIMATOR_REGISTRY: dict[str, AdvantageFn] = {}


def register_adv_est(name_or_enum: str | AdvantageEstimator) -> Callable[[AdvantageFn], AdvantageFn]:
    """Decorator that makes an estimator available as ``algorithm.adv_estimator``.

    All but ``on_policy_distill`` are taken to learn from a reward (``AlgoConfig.learns_from_reward``).

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
        raise ValueError(f"algorithm.adv_estimator={name} is unknown; choose from {known}")
    return ADV_ESTIMATOR_REGISTRY[name]


def reads_student_scores(config: AlgoConfig) -> bool:
    """Whether the estimator, the KL penalty of the reward or importance weights need what the student scored."""
    inputs = inspect.signature(get_adv_estimator_fn(config.adv_estimator)).parameters
    by_estimator = any(key.producer == "student" for name, key in BATCH_KEYS.items() if name in inputs)
    return by_estimator or config.use_kl_in_reward or config.rollout_correction.rollout_is is not None


@register_adv_est(AdvantageEstimator.ON_POLICY_DISTILL)
def compute_on_policy_distill_reverse_kl(
    old_log_probs: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgoConfig | None = None,
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
    # torch's clamp refuses two bounds that are None.
    if low is not None or high is not None:
        advantages = advantages.clamp(min=low, max=high)
    advantages = zero_outside_mask(advantages, response_mask)
    # Two tensors, so that changing the advantages in place leaves the returns as they are.
    return advantages, advantages.clone()


def _group_sizes(index: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Group number of each row (B,), and the rows of each group (G,)."""
    # np.unique sorts, which object arrays of mixed types do not allow; texts do.
    _, inverse, counts = np.unique(np.asarray(index).astype(str), return_inverse=True, return_counts=True)
    return torch.as_tensor(inverse, device=device), torch.as_tensor(counts, device=device)


def _sequence_rewards(token_level_rewards: torch.Tensor) -> torch.Tensor:
    """(B,) float64, in which the mean of equal float32 rewards is that reward, so that ties have advantages of 0."""
    return token_level_rewards.double().sum(dim=-1)


def _group_sum(scores: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    return torch.zeros(num_groups, dtype=scores.dtype, device=scores.device).index_add_(0, group, scores)


def _spread(scores: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One number a sequence (B,), as advantages and returns at its trained tokens (B, R)."""
    advantages = zero_outside_mask(scores.float().unsqueeze(-1).expand(response_mask.shape), response_mask)
    return advantages, advantages.clone()


@register_adv_est(AdvantageEstimator.GRPO)
def compute_grpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgoConfig | None = None,
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
    scores = _sequence_rewards(token_level_rewards)
    group, counts = _group_sizes(index, scores.device)
    mean = _group_sum(scores, group, len(counts)) / counts
    mean = torch.where(counts > 1, mean, 0.0)
    centred = scores - mean[group]
    if norm_adv_by_std_in_grpo:
        variance = _group_sum(centred**2, group, len(counts)) / (counts - 1).clamp(min=1)
        # A group of one has a variance of 0, and epsilon alone would blow its score up.
        std = torch.where(counts > 1, variance.sqrt(), 1.0)
        centred = centred / (std[group] + epsilon)
    return _spread(centred, response_mask)


@register_adv_est(AdvantageEstimator.RLOO)
def compute_rloo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: AlgoConfig | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RLOO (arXiv:2402.14740): a sequence's reward less the mean of the OTHERS of its prompt's group.

    A group of one has no baseline: ``A = s``. Arguments and results as `compute_grpo_outcome_advantage`;
    ``epsilon`` is there for the common signature and divides nothing.
    """
    scores = _sequence_rewards(token_level_rewards)
    group, counts = _group_sizes(index, scores.device)
    others_sum = _group_sum(scores, group, len(counts))[group] - scores
    others = (counts[group] - 1).clamp(min=1)
    baseline = torch.where(counts[group] > 1, others_sum / others, 0.0)
    return _spread(scores - baseline, response_mask)


@register_adv_est(AdvantageEstimator.REINFORCE_PLUS_PLUS)
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgoConfig | None = None,
    gamma: float = 1.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ (arXiv:2501.03262): discounted returns, whitened over all trained tokens of the batch.

    ``G_t = sum over k >= t of gamma^(trained tokens in (t, k]) r_k``: returns pass unchanged through tokens that are
    not trained (tool turns), so an early turn sees the reward of the last one.

    Args:
        token_level_rewards: (B, R); rewards at untrained tokens count towards the trained ones before them.
        response_mask: (B, R) 1 at trained tokens.
        config: its ``gamma`` takes precedence over the argument.
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
    return masked_whiten(returns.double(), response_mask).float(), returns  # in float64 equal returns whiten to 0


@register_adv_est(AdvantageEstimator.REINFORCE_PLUS_PLUS_BASELINE)
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    config: "AlgoConfig | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE++ with a baseline (arXiv:2501.03262): GRPO's reward less the group's mean, whitened over the batch.

    Arguments and results as `compute_grpo_outcome_advantage`, without a division by the group's deviation.
    """
    centred, _ = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False
    )
    advantages = masked_whiten(centred.double(), response_mask).float()
    return advantages, advantages.clone()


class KLController:
    """The weight of the KL penalty in the reward, as ``algorithm.kl_ctrl`` describes it.

    A ``fixed`` one stays; an ``adaptive`` one steers the KL to a target (arXiv:1909.08593, section 2.2):
    ``value *= 1 + clip(current / target - 1, -0.2, 0.2) * min(1, n_steps / horizon)``.
    """

    def __init__(self, settings: KLControlConfig) -> None:
        self.value, self._settings = settings.kl_coef, settings

    def load(self, value: float) -> None:
        """Go on from a saved weight; a fixed one is as the settings have it, which may have changed."""
        if self._settings.type == "adaptive":
            self.value = value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the weight after ``n_steps`` (verl's name) answers with a mean KL of ``current_kl`` nats a token."""
        if self._settings.type == "adaptive":
            error = min(max(current_kl / self._settings.target_kl - 1.0, -0.2), 0.2)
            self.value *= 1.0 + error * min(1.0, n_steps / self._settings.horizon)  # more would change its sign


get_kl_controller = KLController
"""verl's name of it."""

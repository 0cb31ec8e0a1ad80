"""The policy-gradient loss and its terms, as numbers that add up over micro-batches and ranks. Tensors in, tensors out.

In:  log-probs, advantages and masks (B, R). Out: a scalar loss and its metrics, or a KL estimate per token.
Not here: advantages (``verl.trainer.ppo.core_algos``), communication between ranks. A caller with several ranks or
micro-batches passes the counts of the whole mini-batch (`count_trained`, summed over all of them) and gets shares that
add up.

Letters: B sequences, R response tokens. A mask is 1 at trained tokens. Values at masked positions never matter, NaN and
infinity included: they are replaced, not multiplied by zero.
"""

import torch

from verl.config import FSDPActorConfig

Count = int | float | torch.Tensor
"""A number of tokens or sequences."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within this before ``exp``: e^20 and its products stay finite in float32 and bfloat16."""


def zero_outside_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``values`` where the mask is 1, an exact 0 without gradient elsewhere."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def count_trained(loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained tokens, and sequences with at least one of them, as 0-dim int64 tensors.

    Summed over all micro-batches and ranks of a mini-batch they are `agg_loss`'s ``batch_num_tokens`` and
    ``global_batch_size``.
    """
    trained = loss_mask.bool()
    return trained.sum(), trained.any(dim=-1).sum()


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
    row_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token losses as one number.

    - ``token-mean``: sum over trained tokens / number of trained tokens.
    - ``seq-mean-token-sum``: the sum of each sequence, mean over sequences with a trained token.
    - ``seq-mean-token-mean``: the mean of each sequence, mean over sequences with a trained token.
    - ``seq-mean-token-sum-norm``: the second, over R (Dr. GRPO, arXiv:2503.20783).

    With the counts of the whole mini-batch (`count_trained`) the results of all micro-batches and ranks, added up and
    divided by ``dp_size`` (data-parallel training averages gradients over ranks), are the value of the whole
    mini-batch in one piece. Without counts they are taken from ``loss_mask``.

    Args:
        loss_mat: (B, R) loss of each token.
        loss_mask: (B, R) 1 at trained tokens; anything may stand in ``loss_mat`` elsewhere.
        loss_agg_mode: one of the four above.
        dp_size: ranks whose gradients are averaged.
        batch_num_tokens: trained tokens of the whole mini-batch over all ranks.
        global_batch_size: sequences with a trained token, likewise.
        row_tokens: (B,) trained tokens of each sequence, where ``loss_mask`` holds a part of them; None: it holds all.

    Returns:
        0-dim tensor; 0 where nothing is trained.

    Raises:
        ValueError: unknown mode, or several ranks without the count that the mode divides by.
    """
    losses, trained = zero_outside_mask(loss_mat, loss_mask), loss_mask.bool()
    local_tokens, local_sequences = count_trained(loss_mask)
    if loss_agg_mode == "token-mean":
        total, given, local, name = losses.sum(), batch_num_tokens, local_tokens, "batch_num_tokens"
    elif loss_agg_mode in ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        per_sequence = losses.sum(dim=-1)
        if loss_agg_mode == "seq-mean-token-mean":
            tokens = trained.sum(dim=-1) if row_tokens is None else row_tokens
            per_sequence = per_sequence / tokens.clamp(min=1)  # a row may train nothing
        elif loss_agg_mode == "seq-mean-token-sum-norm":
            per_sequence = per_sequence / losses.shape[-1]
        total, given, local, name = per_sequence.sum(), global_batch_size, local_sequences, "global_batch_size"
    else:
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode!r} is not one of token-mean, seq-mean-token-sum, seq-mean-token-mean, "
            "seq-mean-token-sum-norm"
        )
    if given is None and dp_size > 1:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} with dp_size={dp_size} needs {name} over all ranks")
    # A count of nothing stands under a sum of nothing, which must give 0 and not NaN.
    return total / torch.as_tensor(local if given is None else given).clamp(min=1) * dp_size


def compute_policy_loss_vanilla(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: FSDPActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
    row_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss of PPO (arXiv:1707.06347) with dual clip (arXiv:1912.09729).

    With ratio r = exp(log_prob - old_log_prob) the token loss is ``max(-A r, -A clip(r, 1 - low, 1 + high))``, and for
    A < 0 at most ``-A c``.

    Args:
        old_log_prob: (B, R) of the policy that the advantages belong to.
        advantages: (B, R).
        log_prob: (B, R) of the policy that is trained; gradients flow here.
        response_mask: (B, R) 1 at trained tokens.
        loss_agg_mode: see `agg_loss`, which also explains the last four arguments.
        config: clip_ratio_low, clip_ratio_high, clip_ratio_c.
        rollout_is_weights: (B, R) weight of each token, or None for 1.

    Returns:
        the loss, and detached 0-dim metrics that aggregate over micro-batches and ranks as the loss does, each a mean
        over trained tokens: ``actor/pg_clipfrac`` and ``actor/pg_clipfrac_lower`` (shares of tokens that the clip and
        the dual clip bind), ``actor/ppo_kl`` (k1 estimate of KL(old || new)).

    Raises:
        ValueError: no config, or a missing clip bound.
    """
    if config is None or config.clip_ratio_low is None or config.clip_ratio_high is None:
        raise ValueError("the policy loss needs a config with actor.clip_ratio_low and actor.clip_ratio_high")
    # Selected before exp: an infinite ratio at a masked token would turn the gradient of `where` into 0 * inf = NaN.
    log_ratio = zero_outside_mask(log_prob - old_log_prob, response_mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = zero_outside_mask(advantages, response_mask)
    ratio, ceiling = log_ratio.exp(), -advantages * config.clip_ratio_c
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    pessimistic = torch.maximum(unclipped, clipped)
    is_capped = (pessimistic > ceiling) & (advantages < 0)
    losses = torch.where(is_capped, ceiling, pessimistic)
    if rollout_is_weights is not None:
        losses = losses * zero_outside_mask(rollout_is_weights, response_mask)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return agg_loss(values.detach(), response_mask, "token-mean", dp_size, batch_num_tokens)

    metrics = {
        "actor/pg_clipfrac": mean((clipped > unclipped).float()),
        "actor/pg_clipfrac_lower": mean(is_capped.float()),
        "actor/ppo_kl": mean(-log_ratio),
    }
    loss = agg_loss(losses, response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, row_tokens)
    return loss, metrics


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

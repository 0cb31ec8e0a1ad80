"""Masked statistics.

In:  tensors. Out: tensors. Everything is differentiable where torch is, and works on any device.
Not here: log-probs (``verl.ops.linear_log_prob``).

A mask is 0 or 1 and has the shape of the values. What stands where it is 0 never matters, NaN and infinity included:
values are selected, not multiplied by zero. A mean over nothing is 0.
"""

import torch

from verl.ops.policy_loss import zero_outside_mask


def masked_sum(values: torch.Tensor, mask: torch.Tensor, axis: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Sum over the mask, along ``axis`` or over all (0-dim)."""
    return zero_outside_mask(values, mask).sum(dim=axis)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Sum over the mask / number of values in it; 0 where that is none."""
    return masked_sum(values, mask, axis) / mask.bool().sum(dim=axis).clamp(min=1)


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Variance over the mask (0-dim), divided by n - 1 where ``unbiased``, else by n; 0 for fewer than two values."""
    # Before the square: a later where() stops NaN in the value, and not in the gradient.
    values = zero_outside_mask(values, mask)
    count = mask.bool().sum()
    squares = masked_sum((values - masked_mean(values, mask)).square(), mask)
    return squares / (count - int(unbiased)).clamp(min=1)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Values of mean 0 and standard deviation 1 over the mask, 0 outside it.

    Args:
        values: any shape.
        mask: the same shape.
        shift_mean: False puts the original mean back.
    """
    values = zero_outside_mask(values, mask)
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return zero_outside_mask(whitened if shift_mean else whitened + mean, mask)

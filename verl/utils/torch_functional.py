"""Masks and masked statistics.

In:  tensors, or a batch. Out: tensors. Everything is differentiable where torch is, and works on any device.
Not here: log-probs of large vocabularies straight from hidden states (``verl.ops.linear_log_prob``).

A mask is 0 or 1 and has the shape of the values. What stands where it is 0 never matters, NaN and infinity included:
values are selected, not multiplied by zero. A mean over nothing is 0.
Letters: B sequences, R response tokens.
"""

import numpy as np
import torch

from verl.ops.policy_loss import zero_outside_mask
from verl.protocol import DataProto


def real_response_tokens(data: DataProto) -> torch.Tensor:
    """(B, R) bool, True where a response has a token."""
    return data.tensor("attention_mask")[:, -data.tensor("responses").shape[1] :].bool()


def knows_extended(data: DataProto) -> torch.Tensor:
    """(B,) bool, True for a row whose teacher knows the extended ids."""
    known = data.non_tensor_batch.get("teacher_knows_extended", np.zeros(len(data)))
    return torch.from_numpy(known.astype(bool))


def masked_sum(values: torch.Tensor, mask: torch.Tensor, axis: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Sum over the mask, along ``axis`` or over all (0-dim)."""
    return zero_outside_mask(values, mask).sum(dim=axis)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Sum over the mask / number of values in it; 0 where that is none."""
    return masked_sum(values, mask, axis) / mask.bool().sum(dim=axis).clamp(min=1)


def masked_var(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Variance over the mask (0-dim), the sum of squares divided by n - 1; 0 for fewer than two values."""
    # Before the square: a later where() stops NaN in the value, and not in the gradient.
    values = zero_outside_mask(values, mask)
    count = mask.bool().sum()
    squares = masked_sum((values - masked_mean(values, mask)).square(), mask)
    return squares / (count - 1).clamp(min=1)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of mean 0 and standard deviation 1 over the mask, 0 outside it; both of any one shape."""
    values = zero_outside_mask(values, mask)
    whitened = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return zero_outside_mask(whitened, mask)

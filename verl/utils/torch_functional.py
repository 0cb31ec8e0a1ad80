"""Masks and masked statistics, log-probs from logits, and padding.

In:  tensors, or a batch. Out: tensors. Everything is differentiable where torch is, and works on any device.
Not here: log-probs of large vocabularies straight from hidden states (``verl.ops.linear_log_prob``); the two
functions on logits below are for small models and tests.

A mask is 0 or 1 and has the shape of the values. What stands where it is 0 never matters, NaN and infinity included:
values are selected, not multiplied by zero. A mean over nothing is 0.
Letters: B sequences, R response tokens, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from verl.ops.policy_loss import zero_outside_mask
from verl.protocol import DataProto


def real_response_tokens(data: DataProto) -> torch.Tensor:
    """(B, R) bool, True where a response has a token."""
    return data.tensor("attention_mask")[:, -data.tensor("responses").shape[1] :].bool()


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


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs (...), float32, of ``labels`` (...) under ``logits`` (..., V)."""
    logits = logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (...), float32, in nats, of the softmax over ``logits`` (..., V).

    Logits of -inf (forbidden tokens) add nothing.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    # exp(-inf) * -inf is NaN.
    return -torch.where(log_probs.isinf(), 0.0, log_probs.exp() * log_probs).sum(dim=-1)


def pad_sequence_to_length(
    tensors: torch.Tensor, max_seq_len: int, pad_token_id: int | float, left_pad: bool = False
) -> torch.Tensor:
    """(..., T) padded to (..., max_seq_len); returned as it is where T is that much or more."""
    missing = max_seq_len - tensors.shape[-1]
    if missing <= 0:
        return tensors
    return torch.nn.functional.pad(tensors, (missing, 0) if left_pad else (0, missing), value=pad_token_id)


def pad_2d_list_to_length(
    response: Sequence[Sequence[int]], pad_token_id: int, max_length: int | None = None
) -> torch.Tensor:
    """Lists of token ids as one int64 tensor (B, T), padded on the right; T is the longest list or ``max_length``.

    Raises:
        ValueError: a list is longer than ``max_length``.
    """
    width = max((len(ids) for ids in response), default=0) if max_length is None else max_length
    return torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in response], dtype=torch.int64)

"""Masked statistics, log-probs and padding against numbers worked out by hand."""

import math

import pytest
import torch

from verl.utils.torch_functional import (
    entropy_from_logits,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    pad_2d_list_to_length,
    pad_sequence_to_length,
)

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF], [NAN, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_masked_sum_and_mean_select() -> None:
    assert masked_sum(VALUES, MASK).item() == 9.0
    assert masked_mean(VALUES, MASK).item() == 3.0
    assert masked_sum(VALUES, MASK, axis=-1).tolist() == [3.0, 6.0, 0.0]
    assert masked_mean(VALUES, MASK, axis=-1).tolist() == [1.5, 6.0, 0.0]
    assert masked_mean(VALUES, MASK, axis=(0, 1)).item() == 3.0


def test_masked_variance() -> None:
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14
    assert masked_var(VALUES, MASK).item() == 7.0
    assert masked_var(VALUES, MASK, unbiased=False).item() == pytest.approx(14 / 3)
    assert masked_var(VALUES, MASK[1:].new_tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]])).item() == 0.0


def test_masked_whiten_has_mean_zero_and_deviation_one() -> None:
    root = math.sqrt(7)
    expected = [[-2 / root, -1 / root, 0], [3 / root, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(masked_whiten(VALUES, MASK), torch.tensor(expected))
    shifted = [[3 - 2 / root, 3 - 1 / root, 0], [3 + 3 / root, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(masked_whiten(VALUES, MASK, shift_mean=False), torch.tensor(shifted))


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK)])
def test_no_gradient_leaks_through_the_mask(statistic, mask: torch.Tensor) -> None:
    values = VALUES.clone().requires_grad_()
    (statistic(values, mask) * 3).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert values.grad[mask == 0].abs().sum() == 0


def test_log_probs_and_entropy_of_logits() -> None:
    # Probabilities 1/2, 1/4, 1/4 and 1, 0, 0.
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).log() + 3.0
    log_probs = logprobs_from_logits(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(log_probs, torch.tensor([math.log(0.25), 0.0]))
    assert logprobs_from_logits(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32
    # 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2
    torch.testing.assert_close(entropy_from_logits(logits), torch.tensor([1.5 * math.log(2), 0.0]))


def test_padding() -> None:
    ids = torch.tensor([[1, 2]])
    assert pad_sequence_to_length(ids, 4, 9).tolist() == [[1, 2, 9, 9]]
    assert pad_sequence_to_length(ids, 4, 9, left_pad=True).tolist() == [[9, 9, 1, 2]]
    assert pad_sequence_to_length(ids, 1, 9) is ids, "nothing is ever cut"
    assert pad_2d_list_to_length([[1], [2, 3], []], 0).tolist() == [[1, 0], [2, 3], [0, 0]]
    assert pad_2d_list_to_length([[1]], 7, max_length=3).tolist() == [[1, 7, 7]]

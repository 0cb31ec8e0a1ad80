"""Masked statistics, log-probs and padding against numbers worked out by hand."""

import math

import pytest
import torch

from verl.utils import torch_functional as F

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF], [NAN, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_masked_sum_and_mean_select() -> None:
    assert F.masked_sum(VALUES, MASK).item() == 9.0
    assert F.masked_mean(VALUES, MASK).item() == 3.0
    assert F.masked_sum(VALUES, MASK, axis=-1).tolist() == [3.0, 6.0, 0.0]
    assert F.masked_mean(VALUES, MASK, axis=-1).tolist() == [1.5, 6.0, 0.0]
    assert F.masked_mean(VALUES, MASK, axis=(0, 1)).item() == 3.0


def test_masked_variance() -> None:
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14
    assert F.masked_var(VALUES, MASK).item() == 7.0
    assert F.masked_var(VALUES, MASK, unbiased=False).item() == pytest.approx(14 / 3)
    assert F.masked_var(VALUES, MASK[1:].new_tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]])).item() == 0.0


def test_masked_whiten_has_mean_zero_and_deviation_one() -> None:
    root = math.sqrt(7)
    expected = [[-2 / root, -1 / root, 0], [3 / root, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(F.masked_whiten(VALUES, MASK), torch.tensor(expected))
    shifted = torch.tensor(expected) + 3.0 * MASK
    torch.testing.assert_close(F.masked_whiten(VALUES, MASK, shift_mean=False), shifted)


@pytest.mark.parametrize("statistic", [F.masked_sum, F.masked_mean, F.masked_var, F.masked_whiten])
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
    log_probs = F.logprobs_from_logits(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(log_probs, torch.tensor([math.log(0.25), 0.0]))
    assert F.logprobs_from_logits(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32
    # 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2
    torch.testing.assert_close(F.entropy_from_logits(logits), torch.tensor([1.5 * math.log(2), 0.0]))


def test_padding() -> None:
    ids = torch.tensor([[1, 2]])
    assert F.pad_sequence_to_length(ids, 4, 9).tolist() == [[1, 2, 9, 9]]
    assert F.pad_sequence_to_length(ids, 4, 9, left_pad=True).tolist() == [[9, 9, 1, 2]]
    assert F.pad_sequence_to_length(ids, 1, 9) is ids, "nothing is ever cut"
    assert F.pad_2d_list_to_length([[1], [2, 3], []], 0).tolist() == [[1, 0], [2, 3], [0, 0]]
    assert F.pad_2d_list_to_length([[1]], 7, max_length=3).tolist() == [[1, 7, 7]]

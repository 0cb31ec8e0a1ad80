"""Masked statistics against numbers worked out by hand."""

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
    assert F.masked_var(VALUES, MASK[1:].new_tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]])).item() == 0.0


def test_masked_whiten_has_mean_zero_and_deviation_one() -> None:
    root = math.sqrt(7)
    expected = [[-2 / root, -1 / root, 0], [3 / root, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(F.masked_whiten(VALUES, MASK), torch.tensor(expected))


@pytest.mark.parametrize("statistic", [F.masked_sum, F.masked_mean, F.masked_var, F.masked_whiten])
@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK)])
def test_no_gradient_leaks_through_the_mask(statistic, mask: torch.Tensor) -> None:
    values = VALUES.clone().requires_grad_()
    (statistic(values, mask) * 3).sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert values.grad[mask == 0].abs().sum() == 0

"""The leak term of a divergence in single precision."""

import math

import pytest
import torch

from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.linear_log_prob import LinearLogProbs
from verl.vocabulary import Vocabulary


@pytest.mark.parametrize("mass", [1e-6, 2e-6, 1e-3])
def test_a_small_leak_target_is_told_from_rounding(mass: float) -> None:
    """Normalisers are dozens of nats, a float32 of which has steps of 4e-6: more than the target itself."""
    target, known = 1e-6, {}
    for dtype in (torch.float32, torch.float64):
        weight = torch.tensor([[35.1], [35.1 + math.log(mass / (1 - mass))]], dtype=dtype, requires_grad=True)
        teacher, ones = LinearLogProbs(weight.detach(), weight.detach()[:1], 1), torch.ones(1, dtype=dtype)
        options = DivergenceOptions(leak_coef=1.0, leak_target=target)
        labels, vocabulary = torch.tensor([0]), Vocabulary(2, 1)
        loss, stats = linear_divergence(ones[:, None], weight, ones, teacher, options, labels, vocabulary)
        known[dtype] = stats.leak.item(), *torch.autograd.grad(loss, weight)[0].flatten().tolist()
    assert known[torch.float32] == pytest.approx(known[torch.float64], rel=1e-4, abs=1e-11)
    assert known[torch.float32][1:] == pytest.approx([target - mass, mass - target], rel=1e-4, abs=1e-11)

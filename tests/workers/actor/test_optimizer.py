"""Learning-rate schedules in numbers, and what a step does."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from verl.config import OptimizerConfig
from verl.workers.actor.dp_actor import build_optimizer, clipped_step, learning_rate

LINEAR = {"lr_scheduler_type": "linear", "total_training_steps": 5}
COSINE = {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.5}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr_warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"lr_warmup_steps_ratio": 0.2, "total_training_steps": 10}, [0.5, 1.0, 1.0, 1.0]),
        ({**LINEAR, "lr_warmup_steps": 1}, [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({**LINEAR, "lr_warmup_steps": 1, "min_lr_ratio": 0.2}, [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ({**COSINE, "total_training_steps": 2}, [1.0, 0.75, 0.5, 0.5]),
    ],
)
def test_schedules_in_numbers(settings: dict[str, Any], rates: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, **settings)
    assert [learning_rate(config, step) for step in range(len(rates))] == pytest.approx(rates)


def test_only_matrices_decay_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_step_clips_to_the_largest_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clipped_step(model, optimizer, max_norm=1.0, loss=0.5, extended_rows=None) == (pytest.approx(5.0), True)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.6, 0.8]]))
    assert model.weight.grad is None


@pytest.mark.parametrize(("gradient", "loss"), [(float("nan"), 0.5), (1.0, float("nan")), (1.0, float("-inf"))])
def test_a_gradient_or_a_loss_that_is_not_finite_changes_nothing(gradient: float, loss: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, OptimizerConfig())
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clipped_step(model, optimizer, max_norm=1.0, loss=0.5, extended_rows=None)[1]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model.weight.grad = torch.tensor([[gradient, 4.0]])
    assert not clipped_step(model, optimizer, max_norm=1.0, loss=loss, extended_rows=None)[1]
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert model.weight.grad is None


def test_both_betas_are_those_of_the_settings() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, OptimizerConfig(betas=(0.5, 0.75)))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    moments = optimizer.state[model.weight]
    torch.testing.assert_close(moments["exp_avg"], torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(moments["exp_avg_sq"], torch.tensor([[2.25, 4.0]]))

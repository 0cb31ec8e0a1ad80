"""AdamW, its learning-rate schedule and the clipped step.

In:  a sharded model and ``actor.optim``. Out: an optimizer whose learning rate follows warm-up and schedule, and a step
that clips the gradient over all ranks. Weight decay touches matrices only.

Not here: losses, offload of the optimizer's state (``shard``).
"""

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from verl.config import OptimizerConfig
from verl.workers.fsdp.extended_rows import ExtendedRows


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0).

    Warm-up rises linearly and reaches the peak in its last step; none of its steps is lost at 0. After it the rate is
    constant, or falls to ``min_lr_ratio`` by the end of the run: linearly, or along half a cosine.
    """
    total, warmup, schedule = config.total_training_steps, config.lr_warmup_steps, config.lr_scheduler_type
    if warmup < 0:
        warmup = int(config.lr_warmup_steps_ratio * max(total, 0))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


class LearningRateSchedule:
    """Keeps an optimizer's learning rate on its schedule.

    Its only state is the number of steps, so a resumed run follows the settings it is resumed with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self._optimizer, self._config = optimizer, config
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """Continue as after ``steps`` steps; ``rate`` is the learning rate of the next one."""
        self.steps, self.rate = steps, learning_rate(self._config, steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with its state in place from the start (zeros), as checkpoints need it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def clipped_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    loss: float,
    extended_rows: ExtendedRows | None = None,
) -> tuple[float, bool]:
    """Clip the gradient to ``max_norm``, take the step, drop the gradient. Every rank returns the same.

    Args:
        loss: of all ranks together, so that all decide alike. Looked at too, for its gradient may be finite where it is
            not: that of ``x - inf`` is 1.
        extended_rows: of the model, which the step leaves alone where they are frozen.

    Returns:
        the norm of the gradient over all parameters and ranks, before clipping, and whether the step was taken. Not
        where the loss or the norm was not finite: weights and optimizer are as they were, to the bit.
    """
    if extended_rows is not None:
        extended_rows.drop_gradient()
    # It clips at once: a norm that is not finite spoils the gradient, which is dropped below.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # adds up the shards: every rank takes part
    taken = bool(norm.isfinite()) and math.isfinite(loss)
    if taken:
        with nullcontext() if extended_rows is None else extended_rows.held():
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm), taken

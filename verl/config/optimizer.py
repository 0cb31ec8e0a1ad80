"""Optimizer settings (``actor_rollout_ref.actor.optim``)."""

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: str = "constant"
    """``constant``, ``linear`` or ``cosine``, each after the warm-up."""
    lr_warmup_steps: int = -1
    """Linear warm-up in optimizer steps; negative: take ``lr_warmup_steps_ratio`` of all steps."""
    lr_warmup_steps_ratio: float = 0.0
    """Warm-up as a share of all optimizer steps, used where ``lr_warmup_steps`` is negative."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule, as a share of ``lr``."""
    weight_decay: float = 0.01
    """AdamW weight decay, applied to matrices only (not to norms and biases)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    total_training_steps: int = -1
    """Optimizer steps of the whole run; the trainer fills it in where it is negative."""

    def __post_init__(self) -> None:
        schedules = ("constant", "linear", "cosine")
        if self.lr_scheduler_type not in schedules:
            raise ValueError(
                f"actor_rollout_ref.actor.optim.lr_scheduler_type={self.lr_scheduler_type!r} is not one of "
                f"{', '.join(schedules)}"
            )
        if self.lr <= 0:
            raise ValueError(f"actor_rollout_ref.actor.optim.lr={self.lr} must be above 0")
        if not 0 <= self.lr_warmup_steps_ratio <= 1:
            raise ValueError(
                f"actor_rollout_ref.actor.optim.lr_warmup_steps_ratio={self.lr_warmup_steps_ratio} must lie in [0, 1]"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"actor_rollout_ref.actor.optim.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]")

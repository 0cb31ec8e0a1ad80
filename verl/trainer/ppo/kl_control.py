"""The weight of the KL penalty in the reward, fixed or adaptive.

In:  the mean KL of a step. Out: ``value``, the weight in the next step. Not here: the estimate of the KL itself
(``core_algos.kl_penalty``).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl.config.algorithm import KLControlConfig


class FixedKLController:
    """A KL weight that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Nothing to do."""


class AdaptiveKLController:
    """A KL weight that steers the KL to a target (arXiv:1909.08593, section 2.2).

    ``value *= 1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon``.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: int) -> None:
        self.value = init_kl_coef
        self.target = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the weight after ``n_steps`` sequences with a mean KL of ``current_kl`` nats a token."""
        error = min(max(current_kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon


KLController = FixedKLController | AdaptiveKLController


def get_kl_controller(kl_ctrl: "KLControlConfig") -> KLController:
    """The controller that ``algorithm.kl_ctrl`` describes.

    Raises:
        ValueError: unknown type, or an adaptive one whose horizon or target is not positive.
    """
    if kl_ctrl.type == "fixed":
        return FixedKLController(kl_ctrl.kl_coef)
    if kl_ctrl.type == "adaptive":
        if kl_ctrl.horizon <= 0 or kl_ctrl.target_kl <= 0:
            raise ValueError(
                f"algorithm.kl_ctrl.horizon={kl_ctrl.horizon} and target_kl={kl_ctrl.target_kl} must be above 0"
            )
        return AdaptiveKLController(kl_ctrl.kl_coef, kl_ctrl.target_kl, kl_ctrl.horizon)
    raise ValueError(f"algorithm.kl_ctrl.type={kl_ctrl.type!r} is not one of fixed, adaptive")

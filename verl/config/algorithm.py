"""Advantages and corrections (``algorithm``)."""

from dataclasses import dataclass, field

from verl.config.actor import KL_ESTIMATORS
from verl.config.distill import DistillConfig

ON_POLICY_DISTILL = "on_policy_distill"
"""``AdvantageEstimator.ON_POLICY_DISTILL``, for checks that have to do without torch."""
USUAL_ADV_BOUNDS = {"distill_adv_max_clip": 5.0, "distill_adv_min_clip": -30.0}
"""Those of the recipe's YAML, which a run has without asking for them."""


@dataclass
class KLControlConfig:
    """Weight of the KL penalty in the reward."""

    type: str = "fixed"
    """``fixed`` or ``adaptive``."""
    kl_coef: float = 0.001
    """Weight, or the weight to start from."""
    horizon: int = 10000
    """Steps over which the adaptive weight moves."""
    target_kl: float = 0.1
    """KL that the adaptive weight steers to."""

    def __post_init__(self) -> None:
        if self.type not in ("fixed", "adaptive"):
            raise ValueError(f"algorithm.kl_ctrl.type={self.type!r} is not one of fixed, adaptive")


@dataclass
class RolloutCorrectionConfig:
    """Importance weights from the sampler's distribution to the policy's."""

    rollout_is: str | None = None
    """``token``: weight each token by p_policy / p_sampler; null: none (and said so where the two differ)."""
    rollout_is_threshold: float = 2.0
    """Largest weight."""

    def __post_init__(self) -> None:
        if self.rollout_is not in (None, "token"):
            raise ValueError(f"algorithm.rollout_correction.rollout_is={self.rollout_is!r} is not one of token, null")
        if self.rollout_is_threshold <= 0:
            raise ValueError(
                f"algorithm.rollout_correction.rollout_is_threshold={self.rollout_is_threshold} must be above 0"
            )


@dataclass
class AlgoConfig:
    """How advantages are computed."""

    adv_estimator: str = "grpo"
    """A name in ``core_algos.ADV_ESTIMATOR_REGISTRY``: ``on_policy_distill``, ``grpo``, ``rloo``,
    ``reinforce_plus_plus`` or one's own."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """Kept for estimators with a value function."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide GRPO advantages by the group's standard deviation."""
    use_kl_in_reward: bool = False
    """Subtract a KL penalty to the reference from the token rewards; not with ``on_policy_distill``, which has none.
    Where ``distill.coef`` is set, a row's reference is its teacher."""
    kl_penalty: str = "kl"
    """Estimator of that penalty: ``kl`` (k1), ``abs``, ``mse`` (k2) or ``low_var_kl`` (k3)."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    distill_adv_max_clip: float | None = None
    """Upper bound of the distillation advantage; 0 is a bound, null is none."""
    distill_adv_min_clip: float | None = None
    """Lower bound of the distillation advantage; 0 is a bound, null is none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    @property
    def distils(self) -> bool:
        """Whether a teacher is learned from, alone or beside a task reward."""
        return self.adv_estimator == ON_POLICY_DISTILL or bool(self.distill.coef)

    @property
    def learns_from_reward(self) -> bool:
        """Whether advantages are made from a task reward, alone or beside a teacher."""
        return self.adv_estimator != ON_POLICY_DISTILL

    @property
    def missing_reward(self) -> str:
        """What to say where it does, and no reward function is given."""
        return (
            f"algorithm.adv_estimator={self.adv_estimator} learns from a task reward and none is given; set "
            "custom_reward_function.path, and custom_reward_function.name where it is not compute_score"
        )

    def __post_init__(self) -> None:
        if self.kl_penalty not in KL_ESTIMATORS:
            raise ValueError(f"algorithm.kl_penalty={self.kl_penalty!r} is not one of {', '.join(KL_ESTIMATORS)}")
        low, high = self.distill_adv_min_clip, self.distill_adv_max_clip
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"algorithm.distill_adv_min_clip={low} is above algorithm.distill_adv_max_clip={high}; swap them"
            )

"""The trained policy and the frozen reference (``actor_rollout_ref.actor`` and ``actor_rollout_ref.ref``)."""

from dataclasses import dataclass, field

from verl.config.engine import CheckpointConfig, FSDPConfig
from verl.config.model import RefModelConfig
from verl.config.optimizer import OptimizerConfig

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


@dataclass
class FSDPActorConfig:
    """Policy update: batch sizes, loss, optimizer, sharding."""

    strategy: str = "fsdp2"
    """Parallelism of the training workers; ``fsdp2`` (``fsdp`` means the same here)."""
    ppo_mini_batch_size: int = 256
    """Prompts per optimizer step, over all ranks; every prompt counts ``rollout.n`` rows."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Rows per forward and backward pass on one rank, where ``use_dynamic_bsz`` is off."""
    use_dynamic_bsz: bool = True
    """Cut micro-batches by tokens (``ppo_max_token_len_per_gpu``) rather than by rows."""
    ppo_max_token_len_per_gpu: int = 16384
    """Most tokens of one micro-batch on one rank."""
    ppo_epochs: int = 1
    """Passes over a batch."""
    clip_ratio: float = 0.2
    """PPO clip range, where the two bounds below are null."""
    clip_ratio_low: float | None = None
    """Lower PPO clip bound: the ratio is held above ``1 - clip_ratio_low``."""
    clip_ratio_high: float | None = None
    """Upper PPO clip bound: the ratio is held below ``1 + clip_ratio_high``."""
    clip_ratio_c: float = 3.0
    """Dual clip: bound of the ratio for negative advantages, above 1."""
    loss_agg_mode: str = "token-mean"
    """How token losses become one number, over the whole mini-batch and all ranks:
    ``token-mean``, ``seq-mean-token-sum`` or ``seq-mean-token-mean``."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add a KL term to the reference, weighted by ``kl_loss_coef``, at positions whose token the reference knows."""
    kl_loss_coef: float = 0.001
    """Weight of the KL term."""
    kl_loss_type: str = "low_var_kl"
    """Estimator of the KL term: ``kl`` (k1), ``abs``, ``mse`` (k2) or ``low_var_kl`` (k3)."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ref_log_prob_replace_val: float = -100.0
    """Stand-in for a log-prob that does not exist; must equal ``ref.ref_log_prob_replace_val``."""
    freeze_extended_rows: bool = False
    """Leave the rows of extended ids in embedding and lm head as they are: no gradient, no weight decay."""
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.strategy not in ("fsdp", "fsdp2"):
            raise ValueError(f"actor_rollout_ref.actor.strategy={self.strategy!r} is not built here; use fsdp2")
        if self.loss_agg_mode not in LOSS_AGG_MODES:
            raise ValueError(
                f"actor_rollout_ref.actor.loss_agg_mode={self.loss_agg_mode!r} is not one of "
                f"{', '.join(LOSS_AGG_MODES)}"
            )
        if self.kl_loss_type not in KL_ESTIMATORS:
            raise ValueError(
                f"actor_rollout_ref.actor.kl_loss_type={self.kl_loss_type!r} is not one of {', '.join(KL_ESTIMATORS)}"
            )
        self._check_numbers()
        if not self.use_dynamic_bsz and self.ppo_micro_batch_size_per_gpu is None:
            raise ValueError(
                "actor_rollout_ref.actor.use_dynamic_bsz=False needs "
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu; set it, or use_dynamic_bsz=True"
            )
        if self.clip_ratio_low is None:
            self.clip_ratio_low = self.clip_ratio
        if self.clip_ratio_high is None:
            self.clip_ratio_high = self.clip_ratio

    def _check_numbers(self) -> None:
        for name in ("ppo_mini_batch_size", "ppo_max_token_len_per_gpu", "ppo_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"actor_rollout_ref.actor.{name}={getattr(self, name)} must be at least 1")
        if self.clip_ratio_c <= 1:
            raise ValueError(
                f"actor_rollout_ref.actor.clip_ratio_c={self.clip_ratio_c} must be above 1; the usual value is 3"
            )
        if self.grad_clip <= 0:
            raise ValueError(f"actor_rollout_ref.actor.grad_clip={self.grad_clip} must be above 0")


@dataclass
class RefConfig:
    """The frozen reference: in on-policy distillation, the teacher."""

    model: RefModelConfig = field(default_factory=RefModelConfig)
    ref_log_prob_replace_val: float = -100.0
    """The teacher's log-prob at a token it has no embedding for."""
    ref_replace_token_id: int | None = None
    """What the teacher reads in place of such a token; null: its tokenizer's pad id."""
    log_prob_use_dynamic_bsz: bool = True
    """Cut micro-batches by tokens rather than by rows."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens of one micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Rows of one micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)

    def __post_init__(self) -> None:
        if not self.log_prob_use_dynamic_bsz and self.log_prob_micro_batch_size_per_gpu is None:
            raise ValueError(
                "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=False needs "
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu; "
                "set it, or log_prob_use_dynamic_bsz=True"
            )

"""The models and the update (``actor_rollout_ref.{model,actor,ref}``): weights, batches, loss, optimizer, sharding."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from verl.config.types import Bool, Count, Float, Fraction, Int, IsListed, Options, PositiveFloat, section

KLEstimator = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
CheckpointParts = Annotated[list[Annotated[str, Field(pattern="^(model|optimizer|extra|hf_model)$")]], IsListed]


@section("actor_rollout_ref.model")
class HFModelConfig:
    """A causal language model in Hugging Face format."""

    path: str | None = None
    """Folder (or hub name) of the weights, the config and the tokenizer. Required."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer where it is not ``path``."""
    trust_remote_code: Bool = False
    """Run model code that ships with the weights."""
    use_remove_padding: Bool = True
    """Compute no padding: rows are packed where the attention implementation can keep them apart,
    else cut to the longest of each micro-batch."""
    enable_gradient_checkpointing: Bool = True
    """Recompute each block in backward instead of keeping its activations."""
    enable_activation_offload: Bool = False
    """Keep the activations that backward needs in host memory (CUDA only)."""
    override_config: Options = field(default_factory=dict)
    """Entries laid over the model's own config, such as ``attn_implementation``."""


@section("actor_rollout_ref.ref.model")
class RefModelConfig:
    """The teacher's model; everything but these keys is taken from ``actor_rollout_ref.model``."""

    path: str | None = None
    """Folder (or hub name) of the teacher; null: the student's own starting weights."""
    tokenizer_path: str | None = None
    """Folder of the teacher's tokenizer where it is not ``path``."""


@section("actor_rollout_ref.actor.optim")
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """``constant``, ``linear`` or ``cosine``, each after the warm-up."""
    lr_warmup_steps: Int = -1
    """Linear warm-up in optimizer steps; negative: take ``lr_warmup_steps_ratio`` of all steps."""
    lr_warmup_steps_ratio: Fraction = 0.0
    """Warm-up as a share of all optimizer steps, used where ``lr_warmup_steps`` is negative."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule, as a share of ``lr``."""
    weight_decay: Float = 0.01
    """AdamW weight decay, applied to matrices only (not to norms and biases)."""
    betas: Annotated[tuple[Float, Float], IsListed] = (0.9, 0.999)
    """AdamW betas."""
    eps: Float = 1e-8
    """AdamW epsilon."""
    total_training_steps: Int = -1
    """Optimizer steps of the whole run; negative: ``PPOConfig.resolve_schedule`` fills it in."""


@section()
class MixedPrecisionConfig:
    """Precision of FSDP2 compute and gradient reduction."""

    param_dtype: Precision = "auto"
    """Precision of the forward and backward pass; ``auto``: bf16 on CUDA, fp32 on CPU."""
    reduce_dtype: Precision = "fp32"
    """Precision in which gradients are reduced over ranks."""


@section()
class FSDPConfig:
    """Sharding of one model over the training ranks with FSDP2."""

    param_offload: Bool = False
    """Keep the parameters in host memory while the model is idle (CUDA only)."""
    optimizer_offload: Bool = False
    """Keep the optimizer state in host memory between updates (CUDA only)."""
    reshard_after_forward: Bool = True
    """Free gathered parameters after each block's forward pass: less memory, one more gather in backward."""
    model_dtype: Precision = "auto"
    """Precision of the stored parameters; ``auto``: fp32 for a trained model, that of compute for a frozen one."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)


@section("actor_rollout_ref.actor.checkpoint")
class CheckpointConfig:
    """What a checkpoint holds and what is read back from it."""

    save_contents: CheckpointParts = field(default_factory=lambda: ["model", "optimizer", "extra", "hf_model"])
    """Any of ``model`` and ``optimizer`` (shards), ``extra`` (schedule and RNG), ``hf_model`` (weights in
    ``huggingface/``, for transformers and vLLM; ``python -m verl.model_merger merge`` makes them of ``model``)."""
    load_contents: CheckpointParts = field(default_factory=lambda: ["model", "optimizer", "extra"])
    """Parts read on resume."""


@section("actor_rollout_ref.actor")
class FSDPActorConfig:
    """Policy update: batch sizes, loss, optimizer, sharding."""

    ppo_mini_batch_size: Count = 256
    """Prompts per optimizer step, over all ranks; every prompt counts ``rollout.n`` rows."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """Rows per forward and backward pass on one rank, where ``use_dynamic_bsz`` is off."""
    use_dynamic_bsz: Bool = True
    """Cut micro-batches by tokens (``ppo_max_token_len_per_gpu``) rather than by rows."""
    ppo_max_token_len_per_gpu: Count = 16384
    """Most tokens of one micro-batch on one rank."""
    ppo_epochs: Count = 1
    """Passes over a batch."""
    clip_ratio: Float = 0.2
    """PPO clip range, where the two bounds below are null."""
    clip_ratio_low: Float | None = None
    """Lower PPO clip bound: the ratio is held above ``1 - clip_ratio_low``."""
    clip_ratio_high: Float | None = None
    """Upper PPO clip bound: the ratio is held below ``1 + clip_ratio_high``."""
    clip_ratio_c: Annotated[Float, Field(gt=1)] = 3.0
    """Dual clip: bound of the ratio for negative advantages, above 1."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean"
    """How token losses become one number, over the whole mini-batch and all ranks:
    ``token-mean``, ``seq-mean-token-sum`` or ``seq-mean-token-mean``."""
    entropy_coeff: Float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: Bool = False
    """Add a KL term to the reference, weighted by ``kl_loss_coef``, at positions whose token the reference knows."""
    kl_loss_coef: Float = 0.001
    """Weight of the KL term."""
    kl_loss_type: KLEstimator = "low_var_kl"
    """Estimator of the KL term: ``kl`` (k1), ``abs``, ``mse`` (k2) or ``low_var_kl`` (k3)."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    ref_log_prob_replace_val: Float = -100.0
    """Stand-in for a log-prob that does not exist; must equal ``ref.ref_log_prob_replace_val``."""
    freeze_extended_rows: Bool = False
    """Leave the rows of extended ids in embedding and lm head as they are: no gradient, no weight decay."""
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        # The loss reads only the two bounds.
        if self.clip_ratio_low is None:
            self.clip_ratio_low = self.clip_ratio
        if self.clip_ratio_high is None:
            self.clip_ratio_high = self.clip_ratio


@section("actor_rollout_ref.ref")
class RefConfig:
    """The frozen reference: in on-policy distillation, the teacher."""

    model: RefModelConfig = field(default_factory=RefModelConfig)
    ref_log_prob_replace_val: Float = -100.0
    """The teacher's log-prob at a token it has no embedding for."""
    ref_replace_token_id: Int | None = None
    """What the teacher reads in place of such a token; null: its tokenizer's pad id."""
    log_prob_use_dynamic_bsz: Bool = True
    """Cut micro-batches by tokens rather than by rows."""
    log_prob_max_token_len_per_gpu: Int = 16384
    """Most tokens of one micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Rows of one micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)

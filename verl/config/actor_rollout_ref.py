"""The models and what is done with them (``actor_rollout_ref``): weights, update, teacher, generation."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from verl.config import schema
from verl.config.model import AnyTeacherConfig, FSDPConfig, HFModelConfig, RefModelConfig
from verl.config.schema import Count, Fraction, IsListed, NonNegativeFloat, NullIsEmpty, Options, PositiveFloat, section

KLEstimator = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
Beta = Annotated[float, Field(ge=0, lt=1)]
LossMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
CheckpointParts = Annotated[list[Literal["model", "optimizer", "extra", "hf_model"]], IsListed]
TopP = Annotated[float, Field(gt=0, le=1)]
# 0 means all as well; with one spelling, top_k == -1 is the whole test.
TopK = Annotated[int, Field(ge=-1), AfterValidator(lambda count: count or -1)]


@section("actor_rollout_ref.actor.optim")
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_warmup_steps: int = -1
    """Linear warm-up in optimizer steps; negative: take ``lr_warmup_steps_ratio`` of all steps."""
    lr_warmup_steps_ratio: Fraction = 0.0
    """Warm-up as a share of all optimizer steps, used where ``lr_warmup_steps`` is negative."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule, as a share of ``lr``."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay, applied to matrices only (not to norms and biases)."""
    betas: Annotated[tuple[Beta, Beta], IsListed] = (0.9, 0.999)
    """AdamW betas."""
    eps: NonNegativeFloat = 1e-8
    """AdamW epsilon."""
    total_training_steps: int = -1
    """Optimizer steps of the whole run; negative: ``PPOConfig.resolve_schedule`` fills it in."""


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
    use_dynamic_bsz: bool | None = None
    """Cut micro-batches by tokens (``ppo_max_token_len_per_gpu``) rather than by rows; null: unless rows are given."""
    ppo_max_token_len_per_gpu: Count = 16384
    """Most tokens of one micro-batch on one rank."""
    ulysses_sequence_parallel_size: Count = 1
    """Ranks that compute the same rows together, each a part of their tokens, in student and teachers; it divides ranks
    and attention heads, and divides the key heads or is divided by them. 1: every rank has rows of its own."""
    ppo_epochs: Count = 1
    """Passes over a batch."""
    clip_ratio: float = 0.2
    """PPO clip range, where the two bounds below are null."""
    clip_ratio_low: float | None = None
    """Lower PPO clip bound: the ratio is held above ``1 - clip_ratio_low``."""
    clip_ratio_high: float | None = None
    """Upper PPO clip bound: the ratio is held below ``1 + clip_ratio_high``."""
    clip_ratio_c: Annotated[float, Field(gt=1)] = 3.0
    """Dual clip: bound of the ratio for negative advantages, above 1."""
    loss_agg_mode: LossMode = "token-mean"
    """How token losses become one number, over the whole mini-batch and all ranks:
    ``token-mean``, ``seq-mean-token-sum``, ``seq-mean-token-mean`` or ``seq-mean-token-sum-norm``, which divides the
    second by ``data.max_response_length``."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add a KL term to the reference, weighted by ``kl_loss_coef``, at positions whose token the reference knows."""
    kl_loss_coef: float = 0.001
    """Weight of the KL term."""
    kl_loss_type: KLEstimator = "low_var_kl"
    """Estimator of the KL term: ``kl`` (k1), ``abs``, ``mse`` (k2) or ``low_var_kl`` (k3)."""
    router_aux_loss_coef: NonNegativeFloat = 0.0
    """Weight of the loss that balances a mixture's experts, whatever the model's config says; takes a further pass."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    ref_log_prob_replace_val: float = -100.0
    """Stand-in for a log-prob that does not exist; must equal ``ref.ref_log_prob_replace_val``."""
    freeze_extended_rows: bool = False
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
        key, mixed = "actor_rollout_ref.actor.fsdp_config", self.fsdp_config.mixed_precision
        trained = {"model_dtype": self.fsdp_config.model_dtype, "mixed_precision.param_dtype": mixed.param_dtype}
        for name, dtype in (trained | {"mixed_precision.reduce_dtype": mixed.reduce_dtype}).items():
            if dtype == "fp16":
                raise ValueError(f"{key}.{name}=fp16 cannot be trained, which needs loss scaling; use bf16 or fp32")


@section("actor_rollout_ref.ref")
class RefConfig(AnyTeacherConfig):
    """The frozen reference: in on-policy distillation, the teacher. With ``url``, ``model`` is its tokenizer alone."""

    model: Annotated[RefModelConfig, NullIsEmpty] = field(default_factory=RefModelConfig)
    ref_log_prob_replace_val: float = -100.0
    """The teacher's log-prob at a token that it lacks."""
    ref_replace_token_id: int | None = None
    """What the teacher reads in place of such a token; null: its tokenizer's pad id, else its end token."""
    log_prob_use_dynamic_bsz: bool | None = None
    """Cut micro-batches by tokens rather than by rows; null: unless rows are given."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens of one micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Rows of one micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    ulysses_sequence_parallel_size: Count = 1
    """Follows ``actor.ulysses_sequence_parallel_size``."""
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)


@section("actor_rollout_ref.rollout.val_kwargs")
class SamplingConfig:
    """Sampling of validation answers (``rollout.val_kwargs``)."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: TopP = 1.0
    """Smallest set of tokens with this much probability."""
    top_k: TopK = -1
    """Number of most likely tokens; -1 or 0: all."""
    n: Count = 1
    """Answers per prompt."""
    do_sample: bool = True
    """False: take the most likely token, at any ``temperature``."""


@section("actor_rollout_ref.rollout.multi_turn")
class MultiTurnConfig:
    """Turns and tools of an agent loop."""

    max_assistant_turns: int | None = None
    """Most turns the model writes in one conversation; null: no limit but the response length."""
    max_user_turns: int | None = None
    """Most turns that tools or users write; null: no limit."""
    max_parallel_calls: int = 1
    """Most tool calls taken from one assistant turn."""
    max_tool_response_length: int = 256
    """Most characters of one tool response."""
    tool_response_truncate_side: Literal["left", "middle", "right"] = "middle"
    """What stays of an overlong tool response: its ``left`` or ``right`` end, or both with the ``middle`` cut."""
    tool_timeout_s: PositiveFloat | None = 600.0
    """Seconds that a tool has for a call, and for making or releasing its instance: a call that takes longer is
    cancelled, and the model reads an error. A tool has to await what it waits for. null: no limit."""
    tool_config_path: schema.UserPath | None = None
    """YAML that names the tools; null: none."""


@section("actor_rollout_ref.rollout.agent")
class AgentConfig:
    """Agent-loop workers."""

    num_workers: int = 8
    """Most agent-loop processes; never more than the cluster has CPUs."""
    default_agent_loop: str = "tool_agent"
    """Loop of rows without an ``agent_name``: ``tool_agent``, ``single_turn_agent`` or one of the user's own."""
    agent_loop_config_path: schema.UserPath | None = None
    """YAML with a list of loops of the user's own, each ``{name, _target_: module.Class}`` and what the class is called
    with beside the conversation; null: none. Those that ``model.external_lib`` registers need no file."""


@section("actor_rollout_ref.rollout.horizon")
class HorizonConfig:
    """Where training answers are cut (``rollout.horizon=256`` sets ``start`` alone); validation never is."""

    start: Count | None = None
    """Most tokens of a training answer over all turns, at step 1; null: ``data.max_response_length``."""
    end: Count | None = None
    """Most tokens once ``steps`` steps are taken, linear before that and level after it; null: ``start`` throughout."""
    steps: Count | None = None
    """Steps from ``start`` to ``end``."""

    def __post_init__(self) -> None:
        if None in (self.start, self.end, self.steps) and (self.end is not None or self.steps is not None):
            found = f"start={self.start}, end={self.end} and steps={self.steps}"
            raise ValueError(f"actor_rollout_ref.rollout.horizon has {found}; set all three, or start alone")

    def at(self, step: int) -> int | None:
        """Most tokens of an answer in a training step, counted from 1; None: no other limit than R."""
        if self.start is None or self.end is None or self.steps is None:
            return self.start
        return self.start + (self.end - self.start) * min(step - 1, self.steps) // self.steps


def _start_alone(value: Any) -> Any:
    return value if isinstance(value, dict | HorizonConfig) else {"start": value}


@section("actor_rollout_ref.rollout")
class RolloutConfig:
    """Generation engine, sampling, masks and log-prob batch sizes."""

    name: Literal["vllm", "hf"] = "vllm"
    """Engine: ``vllm``, or ``hf`` (transformers ``generate``) for tests and machines without vLLM."""
    n: Count = 1
    """Answers per prompt."""
    oversample: Annotated[float, Field(ge=1)] = 1.0
    """Prompts that are asked for each that a step trains on. Above 1 a step takes those whose answers have all ended
    first and does not wait for the longest; see ``trainer.ppo.prompt_pool``."""
    unfinished: Literal["carry", "drop"] = "carry"
    """What becomes of the other answers: ``carry``, the next batch goes on with them, by its newer weights; ``drop``,
    they are lost, and with them long answers more often than short ones."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of sampler, student and teacher alike; above 0 (greedy validation: ``val_kwargs``)."""
    top_p: TopP = 1.0
    """Nucleus sampling; below 1 the sampler differs from the policy."""
    top_k: TopK = -1
    """Top-k sampling, -1 or 0: all; else the sampler differs from the policy."""
    ignore_eos: bool = False
    """Go on after the end token (benchmarks)."""
    seed: int = 0
    """Seed of sampling, and of the ranks' random numbers."""
    prompt_length: Count = 512
    """Tokens of the longest prompt; follows ``data.max_prompt_length``."""
    response_length: Count = 512
    """Tokens of the longest response over all turns; follows ``data.max_response_length``."""
    horizon: Annotated[HorizonConfig, BeforeValidator(_start_alone)] = field(default_factory=HorizonConfig)
    extend_vocab_start_token: Count | Literal["auto"] | None = None
    """First id of the extended vocabulary E, which the teacher lacks; null: no extension; ``auto``: found by comparing
    the tokenizers. Read it as ``extend_start``."""
    mask_response_if_have_extend_token: bool = False
    """Train on nothing of a response that holds an extended token."""
    mask_after_extend_token: bool = True
    """Train on nothing after the first extended token of a response, where the teacher reads replaced tokens. False is
    what the public fork of verl does."""
    stop_at_extended_token: bool = True
    """End an answer at its first extended token where nothing after it would be trained; see
    ``PPOConfig.stops_at_extended``."""
    calculate_log_probs: bool = False
    """Keep the engine's log-probs of the sampled tokens (``rollout_log_probs``)."""
    dtype: str = "auto"
    """Precision of the engine; ``auto``: what the actor computes in (``fsdp_config.mixed_precision.param_dtype``)."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each GPU's memory for the engine (CUDA)."""
    cpu_kvcache_space_gb: PositiveFloat = 1.0
    """Memory of an engine's KV cache in GiB (CPU)."""
    cpu_engines: Count = 1
    """Engines of each machine without GPUs, which split prompts and cores; two are faster for models so small that an
    engine is busy with its bookkeeping, and slower for others."""
    enforce_eager: bool = False
    """Skip graph capture and compilation; always so on CPU."""
    free_cache_engine: bool = True
    """Free the engine's weights and cache while training runs (CUDA)."""
    tensor_model_parallel_size: Count = 1
    """GPUs per engine replica."""
    max_model_len: int | None = None
    """Longest sequence; null: ``prompt_length + response_length``."""
    max_num_seqs: Count = 256
    """Most sequences decoded at once by one replica."""
    max_num_batched_tokens: Count = 8192
    """Most tokens of one engine step."""
    enable_prefix_caching: bool = True
    """Share the cache of equal prompt beginnings."""
    enable_chunked_prefill: bool = True
    """Split long prompts over engine steps."""
    engine_kwargs: Options = field(default_factory=dict)
    """Options by engine, ``engine_kwargs.vllm.block_size=32``; another engine's group is ignored."""
    timeout_s: PositiveFloat | None = 3600.0
    """Seconds without any finished answer after which a replica counts as hanging: its requests go to another replica
    once, and the run ends where that hangs too or there is none. Also the limit of a weight sync. A healthy engine is
    silent for the length of one answer, far below the default; null: no limit."""
    weight_sync_bucket_mb: Count | None = None
    """Most MiB of weights in a bucket of a sync; two are in memory at once. null: 4096 on CUDA, 512 on CPU."""
    log_prob_use_dynamic_bsz: bool | None = None
    """Cut the student's log-prob micro-batches by tokens rather than by rows; null: unless rows are given."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens of one such micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Rows of one such micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    val_kwargs: SamplingConfig = field(default_factory=SamplingConfig)
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)

    def __post_init__(self) -> None:
        key, longest = "actor_rollout_ref.rollout", self.prompt_length + self.response_length
        if self.mask_response_if_have_extend_token and not self.mask_after_extend_token:
            raise ValueError(
                f"{key}.mask_response_if_have_extend_token=True trains on nothing of a response with extended tokens, "
                "and mask_after_extend_token=False on all of it; leave one at its default"
            )
        if self.unfinished != "carry" and self.oversample == 1:
            what = f"{key}.unfinished={self.unfinished} has no effect with {key}.oversample=1"
            raise ValueError(f"{what}; set oversample above 1, or leave it at carry")
        if self.max_model_len is not None and self.max_model_len < longest:
            raise ValueError(
                f"{key}.max_model_len={self.max_model_len} is below {key}.prompt_length={self.prompt_length} + "
                f"{key}.response_length={self.response_length}; set it to null"
            )
        least = max(self.max_num_seqs, 0 if self.enable_chunked_prefill else self.max_model_len or longest)
        # The engine's own options may change any of these.
        if self.name == "vllm" and self.max_num_batched_tokens < least and "vllm" not in self.engine_kwargs:
            what = f"{key}.max_num_batched_tokens={self.max_num_batched_tokens} is below {least}"
            why = "max_num_seqs, or with enable_chunked_prefill=False the longest sequence"
            raise ValueError(f"{what}, which vLLM has to take at once ({why}); raise it")
        for name, most in (("start", self.horizon.start), ("end", self.horizon.end)):
            if most is not None and most > self.response_length:
                raise ValueError(
                    f"{key}.horizon.{name}={most} is above data.max_response_length={self.response_length}, where "
                    "every answer is cut anyway; lower the first or raise the second"
                )

        carries = f"{key}.oversample={self.oversample} carries on answers"
        fix = f"set {key}.unfinished=drop, or oversample to 1"
        if self.carries and (tools := self.multi_turn.tool_config_path):
            raise ValueError(f"{carries} of a single turn, and multi_turn.tool_config_path={tools} has several; {fix}")
        if self.carries and (self.horizon.end or 0) > (self.horizon.start or 0):
            raise ValueError(f"{carries}, of which those that ended at a growing horizon would stay as short; {fix}")

    @property
    def carries(self) -> bool:
        """Whether answers may be written by several batches, each by its own weights."""
        return self.oversample > 1 and self.unfinished == "carry"

    @property
    def validates_policy(self) -> bool:
        """Whether validation answers are drawn from the distribution that is trained; else their mean log-prob ratio
        does not estimate its reverse KL."""
        sampling = self.val_kwargs
        whole = sampling.top_p == 1 and sampling.top_k == -1
        return sampling.do_sample and whole and sampling.temperature == self.temperature

    @property
    def extend_start(self) -> int | None:
        """``extend_vocab_start_token`` as a number.

        Raises:
            ValueError: it is still ``auto``.
        """
        start = self.extend_vocab_start_token
        if start == "auto":
            raise ValueError(
                "actor_rollout_ref.rollout.extend_vocab_start_token=auto is not resolved; outside of the entry point, "
                "set a number or null"
            )
        return start


@section("actor_rollout_ref")
class ActorRolloutRefConfig:
    """Student, teacher and generation."""

    model: HFModelConfig = field(default_factory=HFModelConfig)
    actor: FSDPActorConfig = field(default_factory=FSDPActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        if self.model.lora_extended_rows and self.actor.freeze_extended_rows:
            raise ValueError(
                "actor_rollout_ref.model.lora_extended_rows=True trains the rows that "
                "actor_rollout_ref.actor.freeze_extended_rows=True freezes; leave one at False"
            )
        trained, frozen = (role.fsdp_config.mixed_precision for role in (self.actor, self.ref))
        if frozen.param_dtype == "auto":
            frozen.param_dtype = trained.param_dtype
        if self.rollout.dtype == "auto":  # an engine that rounds otherwise than the trainer is another policy
            self.rollout.dtype = trained.param_dtype

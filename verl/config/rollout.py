"""How answers are generated (``actor_rollout_ref.rollout``)."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from verl.config.types import Bool, Count, Float, Int, NonNegativeFloat, Options, PositiveFloat, section, spelled

AGENT_LOOPS = ("tool_agent", "single_turn_agent")
"""The agent loops that are built in."""


def _check_top_k(value: int) -> int:
    if value == 0 or value < -1:
        raise PydanticCustomError("top_k", "must be -1 (all) or at least 1")
    return value


def _check_extend_start(value: Any) -> Any:
    value = spelled(value)
    if value in (None, "auto") or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError(
        "extend_start",
        "must be a whole number from 1 on, auto (found by comparing the tokenizers), or null for no extension",
    )


TopP = Annotated[Float, Field(gt=0, le=1)]
TopK = Annotated[Int, AfterValidator(_check_top_k)]
ExtendStart = Annotated[int | str | None, PlainValidator(_check_extend_start)]


@section("actor_rollout_ref.rollout.val_kwargs")
class SamplingConfig:
    """Sampling of validation answers (``rollout.val_kwargs``)."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: TopP = 1.0
    """Smallest set of tokens with this much probability."""
    top_k: TopK = -1
    """Number of most likely tokens; -1: all."""
    n: Count = 1
    """Answers per prompt."""
    do_sample: Bool = True
    """False: take the most likely token, at any ``temperature``."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken rather than a drawn one."""
        return not self.do_sample or self.temperature == 0


@section("actor_rollout_ref.rollout.multi_turn")
class MultiTurnConfig:
    """Turns and tools of an agent loop."""

    max_assistant_turns: Int | None = None
    """Most turns the model writes in one conversation; null: no limit but the response length."""
    max_user_turns: Int | None = None
    """Most turns that tools or users write; null: no limit."""
    max_parallel_calls: Int = 1
    """Most tool calls taken from one assistant turn."""
    max_tool_response_length: Int = 256
    """Most characters of one tool response."""
    tool_response_truncate_side: Literal["left", "middle", "right"] = "middle"
    """What stays of an overlong tool response: its ``left`` or ``right`` end, or both with the ``middle`` cut."""
    tool_timeout_s: PositiveFloat | None = 600.0
    """Seconds that a tool has for a call, and for making or releasing its instance: a call that takes longer is
    cancelled, and the model reads an error. A tool has to await what it waits for. null: no limit."""
    tool_config_path: str | None = None
    """YAML that names the tools; null: none."""


@section("actor_rollout_ref.rollout.agent")
class AgentConfig:
    """Agent-loop workers."""

    num_workers: Int = 8
    """Most agent-loop processes; never more than the cluster has CPUs."""
    default_agent_loop: str = "tool_agent"
    """Loop of rows without an ``agent_name``: ``tool_agent`` or ``single_turn_agent``."""


@section("actor_rollout_ref.rollout")
class RolloutConfig:
    """Generation engine, sampling, masks and log-prob batch sizes."""

    name: Literal["vllm", "hf"] = "vllm"
    """Engine: ``vllm``, or ``hf`` (transformers ``generate``) for tests and machines without vLLM."""
    n: Count = 1
    """Answers per prompt."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of the policy, for the sampler, the student's and the teacher's log-probs alike; above 0
    (greedy validation: ``val_kwargs``)."""
    top_p: TopP = 1.0
    """Nucleus sampling; below 1 the sampler differs from the policy."""
    top_k: TopK = -1
    """Top-k sampling; other than -1 the sampler differs from the policy."""
    ignore_eos: Bool = False
    """Go on after the end token (benchmarks)."""
    seed: Int = 0
    """Seed of the engines."""
    prompt_length: Count = 512
    """Tokens of the longest prompt; follows ``data.max_prompt_length``."""
    response_length: Count = 512
    """Tokens of the longest response over all turns; follows ``data.max_response_length``."""
    extend_vocab_start_token: ExtendStart = None
    """First id of the extended vocabulary E, which the teacher lacks; null: no extension; ``auto``: found by comparing
    the tokenizers. Read it as ``extend_start``."""
    mask_response_if_have_extend_token: Bool = False
    """Train on nothing of a response that holds an extended token."""
    mask_after_extend_token: Bool = True
    """Train on nothing behind the first extended token of a response, where the teacher's context is void. False is
    what the public fork of verl does."""
    calculate_log_probs: Bool = False
    """Keep the engine's log-probs of the sampled tokens (``rollout_log_probs``)."""
    dtype: str = "auto"
    """Precision of the engine; ``auto``: bfloat16 on CUDA, float32 on CPU."""
    gpu_memory_utilization: Float = 0.5
    """Share of each GPU's memory for the engine (CUDA)."""
    cpu_kvcache_space_gb: Float = 1.0
    """Memory of the KV cache in GiB (CPU)."""
    enforce_eager: Bool = False
    """Skip graph capture and compilation; always so on CPU."""
    free_cache_engine: Bool = True
    """Free the engine's weights and cache while training runs (CUDA)."""
    tensor_model_parallel_size: Count = 1
    """GPUs per engine replica."""
    max_model_len: Int | None = None
    """Longest sequence; null: ``prompt_length + response_length``."""
    max_num_seqs: Count = 256
    """Most sequences decoded at once by one replica."""
    max_num_batched_tokens: Count = 8192
    """Most tokens of one engine step."""
    enable_prefix_caching: Bool = True
    """Share the cache of equal prompt beginnings."""
    enable_chunked_prefill: Bool = True
    """Split long prompts over engine steps."""
    engine_kwargs: Options = field(default_factory=dict)
    """Options by engine, ``engine_kwargs.vllm.block_size=32``; another engine's group is ignored."""
    timeout_s: PositiveFloat | None = 3600.0
    """Seconds without any finished answer after which a replica counts as hanging: its requests go to another replica
    once, and the run ends where that hangs too or there is none. Also the limit of a weight sync. A healthy engine is
    silent for the length of one answer, far below the default; null: no limit."""
    weight_sync_bucket_mb: Count = 1024
    """Most weights in flight at once during a weight sync, in MiB."""
    log_prob_use_dynamic_bsz: Bool = True
    """Cut the student's log-prob micro-batches by tokens rather than by rows."""
    log_prob_max_token_len_per_gpu: Int = 16384
    """Most tokens of one such micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Rows of one such micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    val_kwargs: SamplingConfig = field(default_factory=SamplingConfig)
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)

    def __post_init__(self) -> None:
        key = "actor_rollout_ref.rollout"
        if self.mask_response_if_have_extend_token and not self.mask_after_extend_token:
            raise ValueError(
                f"{key}.mask_response_if_have_extend_token=True trains on nothing of a response that holds an extended "
                "token, and mask_after_extend_token=False on all of it; set one of them"
            )
        longest = self.prompt_length + self.response_length
        if self.max_model_len is not None and self.max_model_len < longest:
            raise ValueError(
                f"{key}.max_model_len={self.max_model_len} is below {key}.prompt_length={self.prompt_length} + "
                f"{key}.response_length={self.response_length} = {longest}; raise it, or set it to null"
            )
        if self.name == "vllm":
            self._check_engine_step()

    @property
    def extend_start(self) -> int | None:
        """``extend_vocab_start_token`` as a number.

        Raises:
            ValueError: it is still ``auto``.
        """
        start = self.extend_vocab_start_token
        if isinstance(start, str):
            raise ValueError(
                f"actor_rollout_ref.rollout.extend_vocab_start_token={start} is not resolved; the entry point compares "
                "the tokenizers for it, anything else has to set a number or null"
            )
        return start

    def _check_engine_step(self) -> None:
        """vLLM's rule: an engine step holds a token per sequence and, unless prompts are split, a whole one."""
        tokens_key, tokens = self._engine_setting("max_num_batched_tokens")
        seqs_key, seqs = self._engine_setting("max_num_seqs")
        chunked_key, chunked = self._engine_setting("enable_chunked_prefill")
        longest = self._engine_setting("max_model_len")[1] or self.prompt_length + self.response_length
        if not chunked and tokens < longest:
            raise ValueError(
                f"{tokens_key}={tokens} is below the longest sequence of {longest} tokens; raise it, or set "
                f"{chunked_key}=True"
            )
        if tokens < seqs:
            raise ValueError(f"{tokens_key}={tokens} is below {seqs_key}={seqs}; raise the first or lower the second")

    def _engine_setting(self, name: str) -> tuple[str, Any]:
        """Key and value of what the engine gets: ``engine_kwargs`` wins where it holds a number."""
        key = "actor_rollout_ref.rollout"
        value = (self.engine_kwargs.get(self.name) or {}).get(name)
        if isinstance(value, int):
            return f"{key}.engine_kwargs.{self.name}.{name}", value
        return f"{key}.{name}", getattr(self, name)

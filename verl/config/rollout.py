"""How answers are generated (``actor_rollout_ref.rollout``)."""

from dataclasses import dataclass, field
from typing import Any

ENGINES = ("vllm", "hf")
AGENT_LOOPS = ("tool_agent", "single_turn_agent")
"""The agent loops that are built in."""


@dataclass
class SamplingConfig:
    """Sampling of validation answers (``rollout.val_kwargs``)."""

    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Smallest set of tokens with this much probability."""
    top_k: int = -1
    """Number of most likely tokens; -1: all."""
    n: int = 1
    """Answers per prompt."""
    do_sample: bool = True
    """False: take the most likely token, whatever ``temperature`` says."""

    def __post_init__(self) -> None:
        key = "actor_rollout_ref.rollout.val_kwargs"
        if self.temperature < 0:
            raise ValueError(f"{key}.temperature={self.temperature} must be at least 0 (greedy)")
        if self.n < 1:
            raise ValueError(f"{key}.n={self.n} must be at least 1")
        _check_tail(key, self.top_p, self.top_k)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken rather than a drawn one."""
        return not self.do_sample or self.temperature == 0


@dataclass
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
    tool_response_truncate_side: str = "middle"
    """What stays of an overlong tool response: its ``left`` or ``right`` end, or both with the ``middle`` cut."""
    tool_timeout_s: float | None = 600.0
    """Seconds that a tool has for a call, and for making or releasing its instance: a call that takes longer is
    cancelled, and the model reads an error. A tool has to await what it waits for. null: no limit."""
    tool_config_path: str | None = None
    """YAML that names the tools; null: none."""
    format: str = "hermes"
    """Syntax of tool calls; ``hermes`` is Qwen's."""

    def __post_init__(self) -> None:
        if self.tool_response_truncate_side not in ("left", "middle", "right"):
            raise ValueError(
                "actor_rollout_ref.rollout.multi_turn.tool_response_truncate_side="
                f"{self.tool_response_truncate_side!r} is not one of left, middle, right"
            )
        if self.tool_timeout_s is not None and not self.tool_timeout_s > 0:
            raise ValueError(
                f"actor_rollout_ref.rollout.multi_turn.tool_timeout_s={self.tool_timeout_s} must be above 0, or null "
                "to wait for ever"
            )
        if self.format != "hermes":
            raise ValueError(f"actor_rollout_ref.rollout.multi_turn.format={self.format!r} is unknown; use hermes")


@dataclass
class AgentConfig:
    """Agent-loop workers."""

    num_workers: int = 8
    """Most agent-loop processes; never more than the cluster has CPUs."""
    default_agent_loop: str = "tool_agent"
    """Loop of rows without an ``agent_name``: ``tool_agent`` or ``single_turn_agent``."""


@dataclass
class RolloutConfig:
    """Generation engine, sampling, masks and log-prob batch sizes."""

    name: str = "vllm"
    """Engine: ``vllm``, or ``hf`` (transformers ``generate``) for tests and machines without vLLM."""
    mode: str = "async"
    """Only ``async``: every request is served on its own, as it comes."""
    n: int = 1
    """Answers per prompt."""
    temperature: float = 1.0
    """Softmax temperature of the policy: used by the sampler, the student's and the teacher's log-probs alike."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the sampler differs from the policy."""
    top_k: int = -1
    """Top-k sampling; other than -1 the sampler differs from the policy."""
    ignore_eos: bool = False
    """Go on after the end token (benchmarks)."""
    seed: int = 0
    """Seed of the engines."""
    prompt_length: int = 512
    """Tokens of the longest prompt; follows ``data.max_prompt_length``."""
    response_length: int = 512
    """Tokens of the longest response over all turns; follows ``data.max_response_length``."""
    extend_vocab_start_token: int | str | None = None
    """First id of the extended vocabulary E, which the teacher lacks; null: no extension; ``auto``: found by comparing
    the tokenizers. Read it as ``extend_start``."""
    mask_response_if_have_extend_token: bool = False
    """Train on nothing of a response that holds an extended token."""
    mask_after_extend_token: bool = True
    """Train on nothing behind the first extended token of a response, where the teacher's context is void. False is
    what the public fork of verl does."""
    calculate_log_probs: bool = False
    """Keep the engine's log-probs of the sampled tokens (``rollout_log_probs``)."""
    dtype: str = "auto"
    """Precision of the engine; ``auto``: bfloat16 on CUDA, float32 on CPU."""
    gpu_memory_utilization: float = 0.5
    """Share of each GPU's memory for the engine (CUDA)."""
    cpu_kvcache_space_gb: float = 1.0
    """Memory of the KV cache in GiB (CPU)."""
    enforce_eager: bool = False
    """Skip graph capture and compilation; always so on CPU."""
    free_cache_engine: bool = True
    """Free the engine's weights and cache while training runs (CUDA)."""
    tensor_model_parallel_size: int = 1
    """GPUs per engine replica."""
    max_model_len: int | None = None
    """Longest sequence; null: ``prompt_length + response_length``."""
    max_num_seqs: int = 256
    """Most sequences decoded at once by one replica."""
    max_num_batched_tokens: int = 8192
    """Most tokens of one engine step."""
    enable_prefix_caching: bool = True
    """Share the cache of equal prompt beginnings."""
    enable_chunked_prefill: bool = True
    """Split long prompts over engine steps."""
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options by engine, ``engine_kwargs.vllm.block_size=32``; another engine's group is ignored."""
    timeout_s: float | None = 3600.0
    """Seconds without any finished answer after which a replica is taken to hang: a request that waits for it is asked
    once more of another replica, and ends the run where that hangs too or there is none. An engine has as long for a
    weight sync. The default is far above a healthy engine's silence, which is the length of one answer; null: requests
    are waited for however long they take."""
    weight_sync_bucket_mb: int = 1024
    """Most weights in flight at once during a weight sync, in MiB."""
    log_prob_use_dynamic_bsz: bool = True
    """Cut the student's log-prob micro-batches by tokens rather than by rows."""
    log_prob_max_token_len_per_gpu: int = 16384
    """Most tokens of one such micro-batch on one rank."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Rows of one such micro-batch on one rank, where ``log_prob_use_dynamic_bsz`` is off."""
    val_kwargs: SamplingConfig = field(default_factory=SamplingConfig)
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(
                f"actor_rollout_ref.rollout.name={self.name!r} is unknown; use one of {', '.join(ENGINES)}"
            )
        if self.mode != "async":
            raise ValueError(f"actor_rollout_ref.rollout.mode={self.mode!r} is not built here; use async")
        if self.temperature <= 0:
            raise ValueError(
                f"actor_rollout_ref.rollout.temperature={self.temperature} must be above 0: log-probs are taken at "
                "this temperature (greedy answers belong in actor_rollout_ref.rollout.val_kwargs)"
            )
        _check_tail("actor_rollout_ref.rollout", self.top_p, self.top_k)
        if self.mask_response_if_have_extend_token and not self.mask_after_extend_token:
            raise ValueError(
                "actor_rollout_ref.rollout.mask_response_if_have_extend_token=True trains on nothing of a response "
                "that holds an extended token, and mask_after_extend_token=False on all of it; set one of them"
            )
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(
                f"actor_rollout_ref.rollout.timeout_s={self.timeout_s} must be above 0, or null to wait for ever"
            )
        self._check_sizes()
        self._check_engine_step()
        if not self.log_prob_use_dynamic_bsz and self.log_prob_micro_batch_size_per_gpu is None:
            raise ValueError(
                "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False needs "
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu; "
                "set it, or log_prob_use_dynamic_bsz=True"
            )

    @property
    def extend_start(self) -> int | None:
        """``extend_vocab_start_token`` once it is settled, which happens before anything reads it.

        Raises:
            ValueError: it is still ``auto``.
        """
        start = self.extend_vocab_start_token
        if isinstance(start, str):
            raise ValueError(
                f"actor_rollout_ref.rollout.extend_vocab_start_token={start} was not settled; the entry point does so "
                "by comparing the tokenizers, anything else has to set a number or null"
            )
        return start

    def _check_sizes(self) -> None:
        key = "actor_rollout_ref.rollout"
        for name in ("n", "prompt_length", "response_length", "tensor_model_parallel_size", "weight_sync_bucket_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least 1")
        start = self.extend_vocab_start_token
        if start != "auto" and start is not None and (isinstance(start, str) or start < 1):
            raise ValueError(
                f"{key}.extend_vocab_start_token={start} must be a whole number from 1 on, auto (found by comparing "
                "the tokenizers), or null for no extension"
            )
        longest = self.prompt_length + self.response_length
        if self.max_model_len is not None and self.max_model_len < longest:
            raise ValueError(
                f"{key}.max_model_len={self.max_model_len} is below {key}.prompt_length={self.prompt_length} + "
                f"{key}.response_length={self.response_length} = {longest}; raise it, or set it to null"
            )

    def _check_engine_step(self) -> None:
        """vLLM's rule: an engine step holds a token per sequence and, unless prompts are split, a whole one."""
        if self.name != "vllm":
            return
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


def _check_tail(key: str, top_p: float, top_k: int) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"{key}.top_p={top_p} must lie in (0, 1]")
    if top_k != -1 and top_k < 1:
        raise ValueError(f"{key}.top_k={top_k} must be -1 (all) or at least 1")

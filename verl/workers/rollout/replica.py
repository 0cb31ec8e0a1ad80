"""A rollout replica: one generation engine with the current policy in it.

In:  prompt token ids with sampling parameters, one request at a time and many at once; new weights, bucket by bucket.
Out: ``TokenOutput`` per request, stamped with the version of the weights that wrote it.

    launch ─► generate × many ─► sleep ─► start_weight_update ─► update_weights × buckets ─► finish_weight_update ─┐
                    ▲                                                                                              │
                    └──────────────────────────────────────────────────────────────────────────────────────────────┘

``RolloutReplica`` keeps that order, counts requests and checks that a sync brought the whole model; an engine is a
subclass that fills in the underscored methods. A replica does not tokenize, knows no prompts or turns, and is a plain
class: whoever wants it in a process of its own wraps it.
"""

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verl.config import HFModelConfig, RolloutConfig

if TYPE_CHECKING:
    from verl.weight_sync.bucket import ReceivedWeights
    from verl.workers.rollout.model_facts import ModelFacts


@dataclass
class TokenOutput:
    """What the engine wrote for one request."""

    token_ids: list[int]
    """New tokens, the stop token included."""
    log_probs: list[float] | None
    """Natural log of the probability with which each was drawn: after temperature, top-p and top-k. None: not asked."""
    stop_reason: str
    """``stop`` (a stop token) or ``length`` (``max_tokens``)."""
    weight_version: int
    """Version of the last finished weight sync; 0 before the first."""
    top_log_probs: list[dict[int, float]] | None = None
    """At each new token the likeliest tokens with their log-probs, the drawn one among them; None: not asked."""
    retries: int = 0
    """How often the request was asked again after a replica that hung; set by whoever asks."""


MAX_TOP_LOGPROBS = 20
"""Most of the likeliest tokens that a request may ask for: vLLM's own limit."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters of one request, complete and checked."""

    temperature: float
    """0 takes the most likely token; its log-prob is then that at temperature 1."""
    top_p: float
    top_k: int
    """-1: all."""
    max_tokens: int
    seed: int | None
    """Random stream of this request; None: the engine's."""
    logprobs: bool
    stop_token_ids: frozenset[int]
    """Tokens that end the answer: the model's own end tokens unless ``ignore_eos``, and those asked for."""
    allowed_token_ids: tuple[int, ...] | None
    """The only tokens that may be written; None: all that the tokenizer names."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told at each new token, at most MAX_TOP_LOGPROBS."""


@dataclass(frozen=True)
class _RequestedSampling:
    """Keys of the ``sampling_params`` that ``generate`` takes."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    ignore_eos: bool
    seed: int | None = None
    logprobs: bool = False
    stop_token_ids: Sequence[int] = ()
    allowed_token_ids: Sequence[int] | None = None
    top_logprobs: int = 0


class RolloutReplica(ABC):
    """One engine; see the module. All methods are called from one event loop."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int = 0, device: str = "cpu"
    ) -> None:
        """Set up nothing yet; ``launch`` does.

        Args:
            replica_rank: number of this replica, which gives engines seeds of their own.
            device: ``cpu`` or ``cuda``.
        """
        self.config = config
        self.model_config = model_config
        self.replica_rank = replica_rank
        self.device = device
        self.max_model_len = config.max_model_len or config.prompt_length + config.response_length
        self.weight_version = 0
        self._facts: ModelFacts | None = None
        self._requests = 0
        self._update: ReceivedWeights | None = None
        self._unusable: str | None = None
        self._asleep = False

    @property
    def facts(self) -> "ModelFacts":
        """Vocabulary, end tokens and tensors of the model; known once launched."""
        if self._facts is None:
            raise RuntimeError(f"{self._name} was not launched")
        return self._facts

    async def launch(self) -> None:
        """Load the model and get ready to generate.

        Raises:
            ValueError: the model or an engine option cannot be used.
            RuntimeError: the engine did not start; the message names the cause.
        """
        from verl.workers.rollout.model_facts import read_model_facts

        self._facts = await asyncio.to_thread(read_model_facts, self.model_config)
        await self._launch()

    async def generate(
        self, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], request_id: str
    ) -> TokenOutput:
        """Continue a prompt.

        Args:
            prompt_ids: at least one token, all of them named by the tokenizer.
            sampling_params: any of temperature, top_p, top_k, max_tokens, seed, logprobs, ignore_eos, stop_token_ids,
                allowed_token_ids; what is missing comes from the rollout config. ``max_tokens`` is cut to what
                ``max_model_len`` leaves.

        Raises:
            ValueError: the prompt or a parameter cannot be used.
            RuntimeError: the engine is dead, asleep or in the middle of a weight sync; the message names the cause.
        """
        self._check_ready()
        prompt = self._check_prompt(prompt_ids)
        options = self._complete(sampling_params, len(prompt))
        self._requests += 1
        try:
            return await self._generate(prompt, options, request_id)
        finally:
            self._requests -= 1

    async def start_weight_update(self) -> None:
        """Begin a weight sync; no request may be under way. Wakes what a sleeping engine needs for it."""
        from verl.weight_sync.bucket import ReceivedWeights

        self._check_idle("start_weight_update")
        if self._asleep:
            await self._wake_weights()
        await self._start_update()
        self._update = ReceivedWeights(self.facts.weights)

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Take one bucket of weights.

        Args:
            update_info: ``path`` and ``names`` of a safetensors file in shared memory, or ``names``, ``dtype_names``,
                ``shapes`` and ``ipc_handles`` of CUDA tensors.

        A bucket with a tensor that the model does not have, or not in this shape, is not loaded;
        ``finish_weight_update`` reports it. Where loading fails the replica stays unusable.

        Raises:
            RuntimeError: no sync was begun, or the engine is dead.
        """
        from verl.weight_sync.bucket import bucket_shapes

        if self._update is None:
            raise RuntimeError(f"{self._name}: update_weights before start_weight_update")
        if self._update.receive(bucket_shapes(update_info)):
            await self._load_bucket(update_info)

    async def finish_weight_update(self, version: int) -> None:
        """End a weight sync: the engine now writes with weights ``version``, and remembers nothing of older ones.

        Raises:
            ValueError: tensors were missing, unknown, of another shape or sent twice; the message lists them. The
                replica refuses to generate until a sync succeeds.
        """
        if self._update is None:
            raise RuntimeError(f"{self._name}: finish_weight_update before start_weight_update")
        problems = self._update.problems()
        self._update = None
        self._unusable = f"weight sync {version} did not finish"
        await self._finish_update()
        self._asleep = False
        if problems:
            self._unusable = f"weight sync {version} was incomplete"
            raise ValueError(f"{self._name}: weight sync {version} does not match the model: {'; '.join(problems)}")
        self._unusable = None
        self.weight_version = version

    async def sleep(self) -> None:
        """Free the engine's memory while training runs: its cache and its weights. The next thing must be a sync.

        Does nothing on CPU or where ``rollout.free_cache_engine`` is off.
        """
        if self.device != "cuda" or not self.config.free_cache_engine or self._asleep:
            return
        self._check_idle("sleep")
        await self._sleep()
        self._asleep = True

    async def wake_up(self) -> None:
        """Nothing for an engine that is awake; ``finish_weight_update`` wakes one that sleeps.

        Raises:
            RuntimeError: it sleeps, and its weights are gone.
        """
        if self._asleep:
            raise RuntimeError(f"{self._name} sleeps without weights; a weight sync wakes it")

    async def check_alive(self) -> None:
        """Answering at all says that this process lives; the engine is looked at too.

        Raises:
            RuntimeError: the engine is dead; names the cause.
        """
        await self._check_engine()

    async def shutdown(self) -> None:
        """Stop the engine and everything it started. Safe to call twice."""
        self._unusable = "it was shut down"
        await self._shutdown()

    @property
    def _name(self) -> str:
        return f"{self.config.name} replica {self.replica_rank}"

    def _check_ready(self) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"{self._name} cannot generate: {self._unusable}")
        if self._update is not None:
            raise RuntimeError(f"{self._name} cannot generate in the middle of a weight sync")
        if self._asleep:
            raise RuntimeError(f"{self._name} cannot generate: it sleeps without weights; sync them first")

    def _check_idle(self, what: str) -> None:
        if self._update is not None:
            raise RuntimeError(f"{self._name}: {what} in the middle of a weight sync")
        if self._requests:
            raise RuntimeError(f"{self._name}: {what} while {self._requests} requests are under way")

    def _check_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        prompt = [int(token_id) for token_id in prompt_ids]
        if not prompt:
            raise ValueError("the prompt is empty; at least one token is needed")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in max_model_len="
                f"{self.max_model_len} (actor_rollout_ref.rollout.max_model_len, or prompt_length + response_length)"
            )
        if min(prompt) < 0 or max(prompt) >= self.facts.vocab_size:
            raise ValueError(
                f"the prompt holds token ids from {min(prompt)} to {max(prompt)}; the tokenizer of "
                f"{self.model_config.path} names 0 to {self.facts.vocab_size - 1}"
            )
        return prompt

    def _complete(self, sampling_params: Mapping[str, Any], prompt_tokens: int) -> SamplingOptions:
        known = [field.name for field in dataclasses.fields(_RequestedSampling)]
        unknown = sorted(set(sampling_params) - set(known))
        if unknown:
            raise ValueError(f"sampling parameters {unknown} are unknown; use {', '.join(known)}")
        config = self.config
        defaults = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        defaults |= {"max_tokens": config.response_length, "ignore_eos": config.ignore_eos}
        asked = _RequestedSampling(**(defaults | dict(sampling_params)))
        _check_sampling(asked, self.facts.vocab_size)
        stop_token_ids = set(asked.stop_token_ids) | (set() if asked.ignore_eos else set(self.facts.eos_token_ids))
        return SamplingOptions(
            temperature=float(asked.temperature),
            top_p=float(asked.top_p),
            top_k=int(asked.top_k),
            max_tokens=min(int(asked.max_tokens), self.max_model_len - prompt_tokens),
            seed=None if asked.seed is None else int(asked.seed),
            logprobs=bool(asked.logprobs),
            stop_token_ids=frozenset(stop_token_ids),
            allowed_token_ids=None if asked.allowed_token_ids is None else tuple(asked.allowed_token_ids),
            top_logprobs=int(asked.top_logprobs),
        )

    @abstractmethod
    async def _launch(self) -> None:
        """Start the engine."""

    @abstractmethod
    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        """Answer one checked request."""

    @abstractmethod
    async def _check_engine(self) -> None:
        """Raise RuntimeError, with the cause, where the engine has died though this process lives."""

    @abstractmethod
    async def _start_update(self) -> None:
        """Get ready for new weights."""

    @abstractmethod
    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        """Load one bucket of weights that fit the model."""

    @abstractmethod
    async def _finish_update(self) -> None:
        """Put the new weights to use, drop what was computed with the old ones, wake what still sleeps."""

    @abstractmethod
    async def _sleep(self) -> None:
        """Free weights and cache (CUDA)."""

    @abstractmethod
    async def _wake_weights(self) -> None:
        """Allocate memory for the weights again (CUDA)."""

    @abstractmethod
    async def _shutdown(self) -> None:
        """Stop the engine."""


def _check_sampling(asked: _RequestedSampling, vocab_size: int) -> None:
    if asked.temperature < 0:
        raise ValueError(f"temperature={asked.temperature} must not be negative")
    if not 0 < asked.top_p <= 1:
        raise ValueError(f"top_p={asked.top_p} must lie in (0, 1]")
    if asked.top_k != -1 and asked.top_k < 1:
        raise ValueError(f"top_k={asked.top_k} must be -1 (all) or at least 1")
    if asked.max_tokens < 1:
        raise ValueError(f"max_tokens={asked.max_tokens} must be at least 1")
    if asked.seed is not None and not 0 <= asked.seed < 2**63:
        raise ValueError(f"seed={asked.seed} must lie in [0, 2**63)")
    if not 0 <= asked.top_logprobs <= MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs={asked.top_logprobs} must lie in [0, {MAX_TOP_LOGPROBS}]")
    allowed = asked.allowed_token_ids
    if allowed is not None and (not allowed or min(allowed) < 0 or max(allowed) >= vocab_size):
        raise ValueError(f"allowed_token_ids must hold at least one id, all of them from 0 to {vocab_size - 1}")


def get_replica_class(name: str) -> type[RolloutReplica]:
    """The class of an engine, imported only when asked for.

    Raises:
        ValueError: no such engine, or it is not installed.
    """
    if name == "hf":
        from verl.workers.rollout.hf_replica import HFReplica

        return HFReplica
    if name == "vllm":
        from verl.workers.rollout.vllm_replica import VLLMReplica

        return VLLMReplica
    raise ValueError(f"actor_rollout_ref.rollout.name={name!r} is unknown; use vllm or hf")

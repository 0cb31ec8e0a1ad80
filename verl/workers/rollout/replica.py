"""A rollout replica: one generation engine with the current policy in it.

In:  prompt token ids with sampling parameters, one request at a time and many at once; new weights, bucket by bucket.
Out: ``TokenOutput`` per request, stamped with the version of the weights that wrote it.

    launch ─► generate × many ─► sleep ─► start_weight_update ─► update_weights × buckets ─► finish_weight_update ─┐
                    ▲                                                                                              │
                    └──────────────────────────────────────────────────────────────────────────────────────────────┘

``RolloutReplica`` keeps that order, counts requests and checks that a sync brought the whole model; an engine is a
subclass that fills in the underscored methods. A replica does not tokenize and knows no conversations. It is a plain
class; the caller may run it in another process.
"""

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verl.config import HFModelConfig, RolloutConfig

if TYPE_CHECKING:
    from verl.weight_sync.receive import ReceivedWeights
    from verl.workers.rollout.model_info import ModelInfo

MAX_TOP_LOGPROBS = 20
"""Most of the likeliest tokens that a request may ask for: vLLM's own limit."""


@dataclass
class TokenOutput:
    """What the engine wrote for one request."""

    token_ids: list[int]
    """New tokens, the stop token included."""
    log_probs: list[float] | None
    """Log-probs with which they were drawn: after temperature, top-p and top-k. None: not requested."""
    stop_reason: str
    """``stop`` (a stop token) or ``length`` (``max_tokens``)."""
    weight_version: int
    """Version of the last finished weight sync; 0 before the first."""
    top_log_probs: list[dict[int, float]] | None = None
    """At each new token the likeliest tokens with their log-probs, the drawn one among them; None: not requested."""
    retries: int = 0
    """How often the request was sent again because a replica hung; set by the caller."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters of one request; the fields are the keys that ``generate`` takes.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float
    """0 takes the most likely token; its log-prob is then that at temperature 1."""
    top_p: float
    top_k: int
    """-1: all."""
    max_tokens: int
    ignore_eos: bool = False
    """Whether an answer goes on after the model's end tokens."""
    seed: int | None = None
    """Random stream of this request; None: the engine's."""
    logprobs: bool = False
    stop_token_ids: Sequence[int] | Set[int] = ()
    """Tokens that end the answer; ``generate`` adds the model's end tokens unless ``ignore_eos``."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be written; None: all that the tokenizer names."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are returned with each new token, at most MAX_TOP_LOGPROBS."""

    def __post_init__(self) -> None:
        checks = {
            f"temperature={self.temperature} must not be negative": self.temperature >= 0,
            f"top_p={self.top_p} must lie in (0, 1]": 0 < self.top_p <= 1,
            f"top_k={self.top_k} must be -1 (all) or at least 1": self.top_k == -1 or self.top_k >= 1,
            f"max_tokens={self.max_tokens} must be at least 1": self.max_tokens >= 1,
            f"seed={self.seed} must lie in [0, 2**63)": self.seed is None or 0 <= self.seed < 2**63,
            f"top_logprobs={self.top_logprobs} must lie in [0, {MAX_TOP_LOGPROBS}]": (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS
            ),
        }
        for message, is_well in checks.items():
            if not is_well:
                raise ValueError(message)


class RolloutReplica(ABC):
    """One engine; see the module. All methods are called from one event loop."""

    model_info: "ModelInfo"
    """Vocabulary, end tokens and tensors of the model; known once launched."""

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
        self._name = f"{config.name} replica {replica_rank}"
        self._requests = 0
        self._unusable: str | None = None
        """Why no request can be answered now."""
        self._asleep = False
        self._received: ReceivedWeights | None = None
        """What the weight sync under way has brought."""

    async def launch(self) -> None:
        """Load the model and get ready to generate.

        Raises:
            ValueError: the model or an engine option cannot be used.
            RuntimeError: the engine did not start; the message names the cause.
        """
        from verl.workers.rollout.model_info import read_model_info

        self.model_info = await asyncio.to_thread(read_model_info, self.model_config)
        await self._launch()

    async def generate(
        self, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], request_id: str
    ) -> TokenOutput:
        """Continue a prompt.

        Args:
            prompt_ids: at least one token, all of them named by the tokenizer.
            sampling_params: fields of ``SamplingOptions``; what is missing comes from the rollout config.
                ``max_tokens`` is cut to what ``max_model_len`` leaves.

        Raises:
            ValueError: the prompt or a parameter cannot be used.
            RuntimeError: the engine is dead, asleep or in the middle of a weight sync; the message names the cause.
        """
        if self._unusable is not None:
            raise RuntimeError(f"{self._name} cannot generate: {self._unusable}")
        prompt = [int(token_id) for token_id in prompt_ids]
        self._check_prompt(prompt)
        options = self._complete(sampling_params, len(prompt))
        self._requests += 1
        try:
            return await self._generate(prompt, options, request_id)
        finally:
            self._requests -= 1

    async def start_weight_update(self) -> None:
        """Begin a weight sync; no request may be under way. Wakes what a sleeping engine needs for it.

        Where the last sync failed, this one begins anew.
        """
        from verl.weight_sync.receive import ReceivedWeights

        self._check_idle("start_weight_update")
        self._unusable = "it is in the middle of a weight sync"
        self._received = ReceivedWeights(self.model_info.weights)
        await self._start_update()

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Take one bucket of weights; see ``verl.weight_sync.receive`` for its form.

        A bucket with a tensor that the model does not have, or not in this shape, is not loaded;
        ``finish_weight_update`` reports it. Where loading fails the replica stays unusable.

        Raises:
            RuntimeError: no sync was begun, or the engine is dead.
        """
        if self._received is None:
            raise RuntimeError(f"{self._name}: update_weights before start_weight_update")
        if self._received.add(update_info):
            await self._load_bucket(update_info)

    async def finish_weight_update(self, version: int) -> None:
        """End a weight sync: the engine now writes with weights ``version``, and remembers nothing of older ones.

        Raises:
            ValueError: tensors were missing, unknown, of another shape or sent twice; the message lists them. The
                replica refuses to generate until a sync succeeds.
        """
        if self._received is None:
            raise RuntimeError(f"{self._name}: finish_weight_update before start_weight_update")
        problems = self._received.problems()
        self._received = None
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
        self._unusable = "it sleeps without weights; sync them first"

    async def check_alive(self) -> None:  # noqa: B027 (nothing to do by default)
        """Return at once where the engine lives.

        Raises:
            RuntimeError: the engine is dead though this process lives; names the cause.
        """

    async def shutdown(self) -> None:
        """Stop the engine and everything it started. Safe to call twice."""
        self._unusable = "it was shut down"
        await self._shutdown()

    def _check_idle(self, what: str) -> None:
        if self._requests:
            raise RuntimeError(f"{self._name}: {what} while {self._requests} requests are under way")

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("the prompt is empty; at least one token is needed")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves none for an answer in max_model_len="
                f"{self.max_model_len} (actor_rollout_ref.rollout.max_model_len, or prompt_length + response_length)"
            )
        if min(prompt) < 0 or max(prompt) >= self.model_info.vocab_size:
            raise ValueError(
                f"the prompt holds token ids from {min(prompt)} to {max(prompt)}; the tokenizer of "
                f"{self.model_config.path} names 0 to {self.model_info.vocab_size - 1}"
            )

    def _complete(self, sampling_params: Mapping[str, Any], prompt_tokens: int) -> SamplingOptions:
        """The options of a request: its own parameters, the config's for what is missing, the model's end tokens."""
        known = [field.name for field in dataclasses.fields(SamplingOptions)]
        unknown = sorted(set(sampling_params) - set(known))
        if unknown:
            raise ValueError(f"sampling parameters {unknown} are unknown; use {', '.join(known)}")
        defaults: dict[str, Any] = {
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "top_k": self.config.top_k,
            "max_tokens": self.config.response_length,
            "ignore_eos": self.config.ignore_eos,
        }
        options = SamplingOptions(**{**defaults, **sampling_params})
        allowed, ids = options.allowed_token_ids, self.model_info.vocab_size
        if allowed is not None and (not allowed or min(allowed) < 0 or max(allowed) >= ids):
            raise ValueError(f"allowed_token_ids must hold at least one id, all of them from 0 to {ids - 1}")
        end_ids = () if options.ignore_eos else self.model_info.eos_token_ids
        return dataclasses.replace(
            options,
            max_tokens=min(options.max_tokens, self.max_model_len - prompt_tokens),
            stop_token_ids=frozenset([*options.stop_token_ids, *end_ids]),
        )

    @abstractmethod
    async def _launch(self) -> None:
        """Start the engine."""

    @abstractmethod
    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        """Answer one checked request."""

    @abstractmethod
    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        """Load one bucket of weights that fit the model."""

    @abstractmethod
    async def _shutdown(self) -> None:
        """Stop the engine."""

    async def _start_update(self) -> None:  # noqa: B027 (nothing to do by default)
        """Get ready for new weights; of an engine that is ``_asleep``, allocate memory for them again (CUDA)."""

    async def _finish_update(self) -> None:  # noqa: B027 (nothing to do by default)
        """Put the new weights to use, drop what was computed with the old ones, wake what still sleeps."""

    async def _sleep(self) -> None:  # noqa: B027 (nothing to do by default)
        """Free weights and cache (CUDA)."""


def get_replica_class(name: str) -> type[RolloutReplica]:
    """The class of the engine ``hf`` or ``vllm``, which is imported here: either import takes seconds."""
    if name == "hf":
        from verl.workers.rollout.hf_replica import HFReplica

        return HFReplica
    from verl.workers.rollout.vllm_replica import VLLMReplica

    return VLLMReplica

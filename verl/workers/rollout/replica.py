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
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from verl.config import HFModelConfig, RolloutConfig
from verl.single_controller.base.worker import Channel
from verl.utils.import_utils import load_extern_type
from verl.utils.tokenizer import hf_tokenizer, listed_ids
from verl.weight_sync import ReceivedWeights, WeightShapes, as_file, remove_abandoned_buckets, weight_shapes

REPLICA_CLASSES = {"hf": "HFReplica", "vllm": "VLLMReplica"}
MAX_TOP_LOGPROBS = 20
"""Most of the likeliest tokens that a request may ask for: vLLM's own limit."""
ABORTED = "abort"
"""Stop reason of a request that was ended before its answer was."""


@dataclass
class TokenOutput:
    """What the engine wrote for one request."""

    token_ids: list[int]
    """New tokens, the stop token included."""
    log_probs: list[float] | None
    """Log-probs with which they were drawn: after temperature, top-p and top-k. None: not requested."""
    stop_reason: str
    """``stop`` (a stop token), ``length`` (``max_tokens``) or ``abort`` (`RolloutReplica.abort`)."""
    weight_version: int
    """Version of the last finished weight sync; 0 before the first."""
    top_log_probs: list[dict[int, float]] | None = None
    """At each new token the likeliest tokens with their log-probs, the drawn one among them; None: not requested."""
    retries: int = 0
    """How often the request was sent again because a replica hung; set by the caller."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters of one request; the fields are the keys that ``generate`` takes."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token; its log-prob is then that at temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: all."""
    ignore_eos: bool = False
    """Whether an answer goes on after the model's end tokens."""
    seed: int | None = None
    """Random stream of this request; None: the engine's."""
    place: int = 0
    """How many tokens at the prompt's end are already part of the answer, written by an earlier request. The random
    stream continues after them."""
    logprobs: bool = False
    stop_token_ids: Sequence[int] | Set[int] = ()
    """Tokens that end the answer; ``generate`` adds the model's end tokens unless ``ignore_eos``."""
    stop_from_id: int | None = None
    """The first token with this id or a larger one ends the answer, unless ``ignore_eos``; None: none does."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be written; None: all that the tokenizer names."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are returned with each new token, at most MAX_TOP_LOGPROBS."""

    def ends_with(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        return token in self.stop_token_ids or (self.stop_from_id is not None and token >= self.stop_from_id)

    def cut(self, output: TokenOutput) -> TokenOutput:
        """``output`` up to the token that ends the answer, where there is one: engines may write on after it."""
        ends = (number for number, token in enumerate(output.token_ids, 1) if self.ends_with(token))
        if (end := next(ends, None)) is None:
            return output
        return dataclasses.replace(
            output,
            token_ids=output.token_ids[:end],
            log_probs=None if output.log_probs is None else output.log_probs[:end],
            top_log_probs=None if output.top_log_probs is None else output.top_log_probs[:end],
            stop_reason="stop",
        )


@dataclass(frozen=True)
class ModelInfo:
    """What an engine needs to know about a model besides its weights."""

    vocab_size: int
    """Ids that the tokenizer names, [0, vocab_size): the support of the policy. The model may have more rows."""
    vocab_rows: int
    """Rows of the model's embedding, padding included."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer: those of the tokenizer, the generation config and the config."""
    pad_token_id: int
    weights: WeightShapes
    """What a weight sync brings."""


class RolloutReplica(ABC):
    """One engine; see the module. All methods are called from one event loop."""

    model_info: ModelInfo
    """Vocabulary, end tokens and tensors of the model; known once launched."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int, device: str, is_apart: bool = False
    ) -> None:
        """Set up nothing yet; ``launch`` does.

        Args:
            replica_rank: number of this replica, which gives engines seeds of their own.
            device: ``cpu`` or ``cuda``.
            is_apart: it is beside no rank, so weights come as files on a GPU too.
        """
        if is_apart:  # no rank on this machine does it
            remove_abandoned_buckets()
        self.config, self.model_config = config, model_config
        self.replica_rank, self.device, self.is_apart = replica_rank, device, is_apart
        self.max_model_len = config.max_model_len or config.prompt_length + config.response_length
        self.weight_version = 0
        self._seeds = random.Random(f"{config.seed}, {replica_rank}")
        """Seeds of requests that bring none."""
        self._name = f"{config.name} replica {replica_rank}"
        self._requests = 0
        self._answers: dict[str, asyncio.Task[TokenOutput]] = {}
        """Answers to requests that `answers` began, until it gives them."""
        self._unusable: str | None = None
        """Why no request can be answered now."""
        self._asleep = False
        self._channel: Channel | None = None
        self._received: ReceivedWeights
        """What the last weight sync has brought."""

    async def launch(self) -> None:
        """Load the model and get ready to generate.

        Raises:
            ValueError: the model or an engine option cannot be used.
            RuntimeError: the engine did not start; the message names the cause.
        """
        self.model_info = await asyncio.to_thread(read_model_info, self.model_config)
        await self._launch()

    async def generate(
        self, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], request_id: str
    ) -> TokenOutput:
        """Continue a prompt.

        Args:
            prompt_ids: at least one token, all of them named by the tokenizer.
            sampling_params: fields of ``SamplingOptions``; ``max_tokens`` is cut to what ``max_model_len`` leaves.

        Raises:
            ValueError: the prompt cannot be used.
            TypeError: there is no such parameter.
            RuntimeError: the engine is dead, asleep or in the middle of a weight sync; the message names the cause.
        """
        # Nothing is awaited from here until the request counts, so no weight sync can begin in between.
        if self._unusable is not None:
            raise RuntimeError(f"{self._name} cannot generate: {self._unusable}")
        prompt = [int(token_id) for token_id in prompt_ids]
        options = self._complete(sampling_params, prompt)
        self._requests += 1
        try:
            return options.cut(await self._generate(prompt, options, request_id))
        finally:
            self._requests -= 1

    async def answers(self, new: Sequence[tuple[Any, ...]], request_ids: Sequence[str]) -> dict[str, TokenOutput]:
        """Begin new requests, and wait for the first answers to ``request_ids``; every answer is given once.

        Args:
            new: arguments of `generate`.
            request_ids: of these, or of earlier ones; those that were cancelled are passed over.

        Raises:
            Exception: as `generate`, for the first that fails.
        """
        for request in new:
            self._answers[request[2]] = asyncio.create_task(self.generate(*request))
        asked = {name: task for name in request_ids if (task := self._answers.get(name)) is not None}
        if asked:
            await asyncio.wait(asked.values(), return_when=asyncio.FIRST_COMPLETED)
        ended = {name: task for name, task in asked.items() if task.done() and name in self._answers}
        for name in ended:
            del self._answers[name]
        # All of them are looked at: Python reports an error that nobody asked for.
        for error in [task.exception() for task in ended.values()]:
            if error is not None:
                raise error
        return {name: task.result() for name, task in ended.items()}

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Write no more for these, for whom nobody waits."""
        for name in request_ids:
            if (task := self._answers.pop(name, None)) is not None:
                task.cancel()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests, as far as they are under way: each returns what was written."""
        await asyncio.sleep(0)  # those that `answers` began just before have reached the engine then
        await self._abort(request_ids)

    async def connect(self, rendezvous: Mapping[str, Any], rank: int) -> None:
        """Join the channel through which weights are broadcast, the first process as number ``rank``."""
        self._channel = await asyncio.to_thread(Channel, rendezvous, rank, torch.device(self.device, 0))

    async def start_weight_update(self) -> None:
        """Begin a weight sync; no request may be under way. Wakes what a sleeping engine needs for it.

        May follow a sync whose finish failed. vLLM refuses it if the last sync was never finished.
        """
        if self._requests:
            raise RuntimeError(f"{self._name}: a weight sync while {self._requests} requests are under way")
        # Before the first await, so that no request slips in.
        self._unusable = "it is in the middle of a weight sync"
        self._received = ReceivedWeights(self.model_info.weights)
        await self._start_update()

    async def update_weights(self, update_info: Mapping[str, Any], content: np.ndarray | None = None) -> None:
        """Take one bucket of weights; see ``verl.weight_sync`` for its form, ``content`` is what was stored.

        A bucket with a tensor that the model lacks, or has in another shape, is not loaded; ``finish_weight_update``
        reports it, and a broadcast one raises ValueError at once. Where loading fails the replica stays unusable.
        """
        if self._received.add(update_info):
            with as_file(update_info, content) as bucket:
                await self._load_bucket(bucket)
        elif "dtype_names" in update_info and "ipc_handles" not in update_info:  # the sender waits for all receivers
            raise ValueError(f"{self._name}: a weight bucket does not fit: {self._received.problems()[-1]}")

    async def finish_weight_update(self, version: int) -> None:
        """End a weight sync: the engine now writes with weights ``version``, and remembers nothing of older ones.

        Raises:
            ValueError: tensors were missing, unknown, of another shape or sent twice, or the engine has layers that no
                tensor is for; the message lists them. The replica refuses to generate until a sync succeeds.
        """
        self._unusable = f"weight sync {version} did not finish"
        unloaded = await self._finish_update()
        problems = self._received.problems() or [f"got no weights: {layer}" for layer in unloaded]
        self._asleep = False
        # Raised only now: vLLM refuses to start a sync while another one is open.
        if problems:
            self._unusable = f"weight sync {version} was incomplete"
            raise ValueError(f"{self._name}: weight sync {version} does not match the model: {'; '.join(problems)}")
        self._unusable = None
        self.weight_version = version

    async def sleep(self) -> None:
        """Free the engine's memory while training runs: its cache and its weights. The next thing must be a sync.

        On CUDA, with ``rollout.free_cache_engine``; safe to call twice.
        """
        if self._requests:  # vLLM would end them with what is written
            raise RuntimeError(f"{self._name}: put to sleep while {self._requests} requests are under way")
        if not self._asleep:
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

    def _complete(self, sampling_params: Mapping[str, Any], prompt: Sequence[int]) -> SamplingOptions:
        """The options of a request, with the model's end tokens."""
        ids, remaining = self.model_info.vocab_size, self.max_model_len - len(prompt)
        if not prompt or remaining < 1 or min(prompt) < 0 or max(prompt) >= ids:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens with ids up to {max(prompt, default=None)}: it must hold 1 to "
                f"{self.max_model_len - 1} tokens (rollout.max_model_len) with ids from 0 to {ids - 1} (the tokenizer)"
            )
        options = SamplingOptions(**sampling_params)
        end_ids = () if options.ignore_eos else self.model_info.eos_token_ids
        return dataclasses.replace(
            options,
            max_tokens=min(options.max_tokens, remaining),
            stop_token_ids=frozenset([*options.stop_token_ids, *end_ids]),
            stop_from_id=None if options.ignore_eos else options.stop_from_id,
            seed=self._seeds.getrandbits(63) if options.seed is None else options.seed,
        )

    @abstractmethod
    async def _launch(self) -> None:
        """Start the engine."""

    @abstractmethod
    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        """Answer one checked request; what follows the token that ends the answer is cut off."""

    @abstractmethod
    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        """Load one bucket of weights that fit the model."""

    @abstractmethod
    async def _shutdown(self) -> None:
        """Stop the engine."""

    async def _start_update(self) -> None:  # noqa: B027 (nothing to do by default)
        """Get ready for new weights; of an engine that is ``_asleep``, allocate memory for them again (CUDA)."""

    async def _finish_update(self) -> list[str]:
        """Put the new weights to use, drop what was computed with the old ones, wake what still sleeps.

        Returns:
            the engine's layers that got no weights.
        """
        return []

    async def _abort(self, request_ids: Sequence[str]) -> None:  # noqa: B027 (nothing to do by default)
        """End requests that the engine has."""

    async def _sleep(self) -> None:  # noqa: B027 (nothing to do by default)
        """Free weights and cache (CUDA)."""


def read_model_info(model_config: HFModelConfig) -> ModelInfo:
    """Read it from the model's config, generation config and tokenizer files; no weights are read."""
    path = str(model_config.path)
    config = load_hf_config(model_config)
    tokenizer = hf_tokenizer(model_config.tokenizer_path or path, model_config.trust_remote_code)
    try:
        generation_eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model ships no generation_config.json
        generation_eos = None
    with torch.device("meta"):  # without memory for the weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_config.trust_remote_code)
    return ModelInfo(
        vocab_size=len(tokenizer),  # `tokenizer.vocab_size` leaves out added tokens
        vocab_rows=config.vocab_size,
        eos_token_ids=listed_ids(tokenizer.eos_token_id, generation_eos, config.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
        weights=weight_shapes(model),
    )


def load_hf_config(model_config: HFModelConfig) -> Any:
    """The model's config with ``model.override_config`` over it."""
    return AutoConfig.from_pretrained(
        model_config.path, trust_remote_code=model_config.trust_remote_code, **model_config.config_entries
    )


def get_replica_class(name: str) -> type[RolloutReplica]:
    """The class of the engine ``hf`` or ``vllm``, loaded by name: they build on this module."""
    replica_class: type[RolloutReplica] = load_extern_type(f"{__package__}.{name}_replica", REPLICA_CLASSES[name])
    return replica_class

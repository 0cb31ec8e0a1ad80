"""The small rollout replica: transformers ``generate``, for tests and for machines without vLLM.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

    requests ──► wait a few ms ──► one left-padded batch ──► generate ──► rows cut at their stop token
                      ▲                                                        │
                      └────────────── requests that came meanwhile ◄───────────┘

Every row keeps its own sampling parameters and random stream, so an answer does not depend on what it was batched
with. There is no continuous batching and no prefix cache.

B sequences of the batch, P padded prompt, V vocabulary rows of the model.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from verl.config import HFModelConfig, RolloutConfig
from verl.utils.device import resolve_dtype, synchronize
from verl.weight_sync.bucket import bucket_tensors
from verl.workers.rollout.model_facts import load_hf_config
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATHER_S = 0.005
"""How long requests are gathered before a batch starts."""

Result = TypeVar("Result")


@dataclass
class _Request:
    prompt: list[int]
    options: SamplingOptions
    seed: int
    answer: asyncio.Future[TokenOutput]


class HFReplica(RolloutReplica):
    """A transformers model on one device."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int = 0, device: str = "cpu"
    ) -> None:
        super().__init__(config, model_config, replica_rank, device)
        if config.tensor_model_parallel_size != 1:
            raise ValueError(
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={config.tensor_model_parallel_size} and "
                "actor_rollout_ref.rollout.name=hf: this engine runs on one device; use 1, or rollout.name=vllm"
            )
        self._torch_device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-replica")
        self._waiting: list[_Request] = []
        self._batching: asyncio.Task[None] | None = None
        self._unseeded = itertools.count()
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The model; exists once launched."""
        if self._model is None:
            raise RuntimeError(f"{self._name} was not launched")
        return self._model

    async def _launch(self) -> None:
        self._model = await self._on_thread(self._load_model)

    def _load_model(self) -> "PreTrainedModel":
        config = load_hf_config(self.model_config)
        model = AutoModelForCausalLM.from_pretrained(
            self.model_config.path,
            config=config,
            dtype=resolve_dtype(self.config.dtype, self.device),
            trust_remote_code=self.model_config.trust_remote_code,
        )
        # The checkpoint's own sampling defaults must not mix with those of a request.
        model.generation_config = GenerationConfig()
        return model.to(self._torch_device).eval()

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        seed = options.seed
        if seed is None:
            seed = hash((self.config.seed, self.replica_rank, next(self._unseeded))) % 2**63
        answer: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(prompt, options, seed, answer))
        if self._batching is None or self._batching.done():
            self._batching = asyncio.create_task(self._answer_waiting())
        return await answer

    async def _answer_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            self._waiting = [request for request in self._waiting if not request.answer.done()]  # cancelled meanwhile
            batch = self._waiting[: self.config.max_num_seqs]
            del self._waiting[: len(batch)]
            if not batch:
                continue
            [outcome] = await asyncio.gather(self._on_thread(self._generate_batch, batch), return_exceptions=True)
            for index, request in enumerate(batch):
                if request.answer.done():  # its caller was cancelled
                    continue
                if isinstance(outcome, BaseException):
                    message = f"{self._name} failed: {type(outcome).__name__}: {outcome}"
                    request.answer.set_exception(RuntimeError(message))
                else:
                    request.answer.set_result(outcome[index])

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[_Request]) -> list[TokenOutput]:
        options = [request.options for request in batch]
        sampler = _Sampler(options, [request.seed for request in batch], self.facts.vocab_size)
        longest = max(len(request.prompt) for request in batch)
        padding = [longest - len(request.prompt) for request in batch]
        pad = self.facts.pad_token_id
        ids = [[pad] * width + request.prompt for width, request in zip(padding, batch, strict=True)]
        mask = [[0] * width + [1] * (longest - width) for width in padding]
        sequences = self.model.generate(
            torch.tensor(ids, device=self._torch_device),
            attention_mask=torch.tensor(mask, device=self._torch_device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(option.max_tokens for option in options), pad_token_id=pad
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_RowStops(batch, longest)]),
        )
        log_probs = torch.stack(sampler.log_probs, dim=1).tolist()  # B x steps
        written = sequences[:, longest:].tolist()
        return [
            self._cut(option, written[row], log_probs[row], [step[row] for step in sampler.top])
            for row, option in enumerate(options)
        ]

    def _cut(
        self, options: SamplingOptions, written: list[int], log_probs: list[float], top: list[dict[int, float]]
    ) -> TokenOutput:
        stops = (step + 1 for step, token_id in enumerate(written) if token_id in options.stop_token_ids)
        stop = next((step for step in stops if step <= options.max_tokens), None)
        end = options.max_tokens if stop is None else stop
        return TokenOutput(
            token_ids=written[:end],
            log_probs=log_probs[:end] if options.logprobs else None,
            stop_reason="length" if stop is None else "stop",
            weight_version=self.weight_version,
            top_log_probs=top[:end] if options.top_logprobs else None,
        )

    async def _check_engine(self) -> None:
        """The engine is this process."""

    async def _start_update(self) -> None:
        """Weights are copied in place; nothing to prepare."""

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        await self._on_thread(self._copy_weights, update_info)

    @torch.no_grad()
    def _copy_weights(self, update_info: Mapping[str, Any]) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in bucket_tensors(update_info, self._torch_device):
            parameters[name].copy_(tensor)
        # The sender frees its tensors when this returns.
        synchronize(self.device)

    async def _finish_update(self) -> None:
        """Nothing was computed ahead with the old weights."""

    async def _sleep(self) -> None:
        await self._on_thread(self.model.to, torch.device("cpu"))
        await self._on_thread(torch.cuda.empty_cache)

    async def _wake_weights(self) -> None:
        await self._on_thread(self.model.to, self._torch_device)

    async def _shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._model = None

    async def _on_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class _Sampler(LogitsProcessor):
    """Draws each row's next token and forces ``generate``, which then only takes the largest score, to take it.

    Gumbel-max: with E ~ Exp(1) drawn for every token, argmax(log p - log E) is a draw from p.
    """

    def __init__(self, options: Sequence[SamplingOptions], seeds: Sequence[int], vocab_size: int) -> None:
        self.log_probs: list[torch.Tensor] = []
        """Per step (B,): log-prob of the drawn token under the distribution it was drawn from."""
        self.top: list[list[dict[int, float]]] = []
        """Per step and row the likeliest tokens with their log-probs, and the drawn one; as many as the row asks."""
        self._tops = [option.top_logprobs for option in options]
        self._vocab_size = vocab_size
        self._greedy = torch.tensor([option.temperature == 0 for option in options])
        self._temperature = torch.tensor([option.temperature or 1.0 for option in options])
        limits = [(-1, 1.0) if option.temperature == 0 else (option.top_k, option.top_p) for option in options]
        self._top_k = torch.tensor([vocab_size if k == -1 else k for k, _ in limits])
        self._top_p = torch.tensor([p for _, p in limits])
        self._truncates = any(k != -1 or p < 1 for k, p in limits)
        self._allowed = {row: list(ids) for row, o in enumerate(options) if (ids := o.allowed_token_ids) is not None}
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in, and out with 0 at the drawn token and minus infinity elsewhere."""
        logits = scores.float()
        logits[:, self._vocab_size :] = -torch.inf
        for row, allowed in self._allowed.items():
            kept = logits[row, allowed]
            logits[row] = -torch.inf
            logits[row, allowed] = kept
        logits /= self._temperature.to(logits.device)[:, None]
        if self._truncates:
            logits = truncate(logits, self._top_k.to(logits.device), self._top_p.to(logits.device))
        log_probs = logits.log_softmax(-1)
        drawn = (log_probs + self._noise(log_probs)).argmax(-1, keepdim=True)
        self.log_probs.append(log_probs.gather(1, drawn)[:, 0].cpu())
        self.top.append([self._likeliest(*row) for row in zip(log_probs, drawn[:, 0], self._tops, strict=True)])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    @staticmethod
    def _likeliest(log_probs: torch.Tensor, drawn: torch.Tensor, count: int) -> dict[int, float]:
        if not count:
            return {}
        values, tokens = log_probs.topk(count)
        likeliest = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        return {int(drawn): float(log_probs[drawn]), **likeliest}

    def _noise(self, log_probs: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros(log_probs.shape)
        for row, generator in enumerate(self._generators):
            if not self._greedy[row]:
                noise[row, : self._vocab_size].exponential_(generator=generator).log_().neg_()
        return noise.to(log_probs.device)


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) with all but the top-k, and of these all but the top-p, at minus infinity.

    Args:
        top_k: (B,) number of tokens to keep.
        top_p: (B,) a token is kept while those above it hold less than this much of the top-k's probability.
    """
    ranked, order = logits.sort(-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ranked = ranked.masked_fill(rank >= top_k[:, None], -torch.inf)
    probs = ranked.softmax(-1)
    above = probs.cumsum(-1) - probs
    cut = above >= top_p[:, None]
    # Rounding must not take the likeliest token, nor anything where there is no limit.
    cut &= (rank > 0) & (top_p[:, None] < 1)
    return torch.empty_like(logits).scatter_(1, order, ranked.masked_fill(cut, -torch.inf))


class _RowStops(StoppingCriteria):
    """Ends each row at its own stop tokens or token limit, or where its caller has gone."""

    def __init__(self, batch: Sequence[_Request], prompt_width: int) -> None:
        options = [request.options for request in batch]
        self._answers = [request.answer for request in batch]
        self._prompt_width = prompt_width
        self._stop_ids = [torch.tensor(sorted(option.stop_token_ids), dtype=torch.long) for option in options]
        self._max_tokens = torch.tensor([option.max_tokens for option in options])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Sequences so far (B, P + steps); returns which rows are done, (B,) bool."""
        last = input_ids[:, -1].cpu()
        stopped = torch.stack([(last[row] == ids).any() for row, ids in enumerate(self._stop_ids)])
        full = input_ids.shape[1] - self._prompt_width >= self._max_tokens
        gone = torch.tensor([answer.done() for answer in self._answers])
        return (stopped | full | gone).to(input_ids.device)

"""The small rollout replica: transformers ``generate``, for tests and for machines without vLLM.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

    requests ──► wait a few ms ──► one left-padded batch ──► generate ──► rows cut at their stop token
                      ▲                                                        │
                      └────────────── requests that came meanwhile ◄───────────┘

A batch has one temperature, top-p and top-k; every row has its own random stream and stop tokens, so an answer does not
depend on what it was batched with. There is no continuous batching and no prefix cache.

B sequences of the batch, P padded prompt, V vocabulary rows of the model.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from verl.ops.attention import needs_eager
from verl.utils.device import resolve_dtype, synchronize
from verl.weight_sync import bucket_tensors
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput, load_hf_config

GATHER_S = 0.005
"""How long requests are gathered before a batch starts."""


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    options: SamplingOptions
    seed: int
    answer: asyncio.Future[TokenOutput]

    @property
    def distribution(self) -> tuple[float, float, int]:
        """What rows of one batch have in common."""
        return self.options.temperature, self.options.top_p, self.options.top_k


class HFReplica(RolloutReplica):
    """A transformers model on one device."""

    model: Any = None
    """A ``PreTrainedModel``, once launched."""

    async def _launch(self) -> None:
        self._torch_device = torch.device(self.device, 0)
        self._waiting: list[_Request] = []
        self._batching: asyncio.Task[None] | None = None
        config = load_hf_config(self.model_config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.model_config.path,
            config=config,
            dtype=resolve_dtype(self.config.dtype, self.device),
            trust_remote_code=self.model_config.trust_remote_code,
            **({"attn_implementation": "eager"} if needs_eager(config) else {}),
        )
        # The checkpoint's own sampling defaults must not mix with those of a request.
        model.generation_config = transformers.GenerationConfig()
        self.model = model.to(self._torch_device).eval()

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        assert options.seed is not None, "requests that bring none were given one"
        answer: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(prompt, options, options.seed, answer))
        if self._batching is None or self._batching.done():
            self._batching = asyncio.create_task(self._answer_waiting())
        return await answer

    async def _answer_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            waiting = [request for request in self._waiting if not request.answer.done()]  # cancelled meanwhile
            alike = [request for request in waiting if request.distribution == waiting[0].distribution]
            batch = alike[: self.config.max_num_seqs]
            self._waiting = [request for request in waiting if request not in batch]
            if not batch:
                continue
            outcome: Any
            # An error comes as a value: it is for these requests, and the loop goes on with the others.
            [outcome] = await asyncio.gather(asyncio.to_thread(self._generate_batch, batch), return_exceptions=True)
            for index, request in enumerate(batch):
                if request.answer.done():  # its caller was cancelled
                    continue
                if isinstance(outcome, BaseException):
                    request.answer.set_exception(outcome)
                else:
                    request.answer.set_result(outcome[index])

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[_Request]) -> list[TokenOutput]:
        sampler = _Sampler(batch, self.model_info.vocab_size)
        longest = max(len(request.prompt) for request in batch)
        padding = [longest - len(request.prompt) for request in batch]
        pad = self.model_info.pad_token_id
        ids = [[pad] * width + request.prompt for width, request in zip(padding, batch, strict=True)]
        mask = [[0] * width + [1] * (longest - width) for width in padding]
        sequences = self.model.generate(
            torch.tensor(ids, device=self._torch_device),
            attention_mask=torch.tensor(mask, device=self._torch_device),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=max(request.options.max_tokens for request in batch), pad_token_id=pad
            ),
            logits_processor=transformers.LogitsProcessorList([sampler]),
            stopping_criteria=transformers.StoppingCriteriaList([_RowStops(batch, longest)]),
        )
        log_probs = torch.stack(sampler.log_probs, dim=1).tolist()  # B x steps
        written = sequences[:, longest:].tolist()
        # A batch goes on until its last row has ended, without padding in the others: `generate` pads ended rows only
        # where a criterion has `eos_token_id`.
        return [
            TokenOutput(
                token_ids=written[row][: (end := request.options.max_tokens)],
                log_probs=log_probs[row][:end] if request.options.logprobs else None,
                stop_reason="length",
                weight_version=self.weight_version,
                top_log_probs=[step[row] for step in sampler.top[:end]] if request.options.top_logprobs else None,
            )
            for row, request in enumerate(batch)
        ]

    async def _start_update(self) -> None:
        if self._asleep:
            await asyncio.to_thread(self.model.to, self._torch_device)

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        @torch.no_grad()
        def copy() -> None:
            parameters = dict(self.model.named_parameters())
            for name, tensor in bucket_tensors(update_info, self._torch_device, self._channel):
                parameters[name].copy_(tensor)
            # The sender frees its tensors when this returns.
            synchronize(self.device)

        await asyncio.to_thread(copy)

    async def _sleep(self) -> None:
        await asyncio.to_thread(self.model.to, "cpu")
        torch.cuda.empty_cache()

    async def _shutdown(self) -> None:
        self.model = None


class _Sampler(transformers.LogitsProcessor):
    """Draws each row's next token and forces ``generate``, which then only takes the largest score, to take it.

    Gumbel-max: with E ~ Exp(1) drawn for every token, argmax(log p - log E) is a draw from p.
    """

    def __init__(self, batch: Sequence[_Request], vocab_size: int) -> None:
        self.log_probs: list[torch.Tensor] = []
        """Per step (B,): log-prob of the drawn token under the distribution it was drawn from."""
        self.top: list[list[dict[int, float]]] = []
        """Per step and row the ``top_logprobs`` likeliest tokens and the drawn one, with their log-probs."""
        self._vocab_size = vocab_size
        self._options = [request.options for request in batch]
        self._generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        temperature, top_p, top_k = batch[0].distribution
        self._warpers = transformers.LogitsProcessorList()
        """None: the most likely token is taken."""
        if temperature > 0:
            self._warpers.append(transformers.TemperatureLogitsWarper(float(temperature)))
            if top_k != -1:
                self._warpers.append(transformers.TopKLogitsWarper(top_k))
            if top_p < 1:
                self._warpers.append(transformers.TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in, and out with 0 at the drawn token and minus infinity elsewhere."""
        logits = scores.float()
        logits[:, self._vocab_size :] = -torch.inf
        for row, options in enumerate(self._options):
            if options.allowed_token_ids is not None:
                forbidden = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
                forbidden[list(options.allowed_token_ids)] = False
                logits[row, forbidden] = -torch.inf
        log_probs = self._warpers(input_ids, logits).log_softmax(-1)
        noise = torch.zeros(log_probs.shape)
        if self._warpers:
            # A stream for each row, on the CPU: the noise depends neither on the other rows nor on the device.
            for row, generator in enumerate(self._generators):
                noise[row, : self._vocab_size].exponential_(generator=generator).log_().neg_()
        drawn = (log_probs + noise.to(log_probs.device)).argmax(-1, keepdim=True)
        self.log_probs.append(log_probs.gather(1, drawn)[:, 0].cpu())
        self.top.append([_likeliest(*row) for row in zip(log_probs, drawn[:, 0], self._options, strict=True)])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _likeliest(log_probs: torch.Tensor, drawn: torch.Tensor, options: SamplingOptions) -> dict[int, float]:
    """The likeliest tokens that a row asks for and the drawn one, with log-probs."""
    values, tokens = log_probs.topk(options.top_logprobs)
    return {int(drawn): float(log_probs[drawn]), **dict(zip(tokens.tolist(), values.tolist(), strict=True))}


class _RowStops(transformers.StoppingCriteria):
    """Ends each row at its own stop tokens or token limit, or where its caller has gone."""

    def __init__(self, batch: Sequence[_Request], prompt_width: int) -> None:
        self._answers = [request.answer for request in batch]
        self._prompt_width = prompt_width
        firsts = (math.inf if r.options.stop_from_id is None else r.options.stop_from_id for r in batch)
        self._stops = [(r.options.stop_token_ids, first) for r, first in zip(batch, firsts, strict=True)]
        self._max_tokens = torch.tensor([request.options.max_tokens for request in batch])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Sequences so far (B, P + steps); returns which rows are done, (B,) bool."""
        last = zip(input_ids[:, -1].tolist(), self._stops, strict=True)
        stopped = torch.tensor([token_id in ids or token_id >= start for token_id, (ids, start) in last])
        full = input_ids.shape[1] - self._prompt_width >= self._max_tokens
        gone = torch.tensor([answer.done() for answer in self._answers])
        return (stopped | full | gone).to(input_ids.device)

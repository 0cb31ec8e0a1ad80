"""The small rollout replica: transformers ``generate``, for tests and for machines without vLLM.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

    requests ──► wait a few ms ──► one left-padded batch ──► generate ──► each row as it ends
                      ▲                                         │
                      └───── requests that came meanwhile ◄─────┘

A batch has one temperature, top-p and top-k; every row has its own random stream and stop tokens, so an answer does not
depend on what it was batched with. There is no continuous batching and no prefix cache.

B sequences of the batch, P padded prompt, V vocabulary rows of the model.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from verl.ops.attention import needs_eager
from verl.utils.device import resolve_dtype, synchronize
from verl.weight_sync import bucket_tensors
from verl.workers.rollout.replica import ABORTED, RolloutReplica, SamplingOptions, TokenOutput, load_hf_config

GATHER_S = 0.005
"""How long requests are gathered before a batch starts."""


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    options: SamplingOptions
    seed: int
    answer: asyncio.Future[TokenOutput]
    id: str = ""
    aborted: bool = False

    @property
    def distribution(self) -> tuple[float, float, int]:
        """Temperature, top-p and top-k, which rows of one batch have in common."""
        return self.options.temperature, self.options.top_p, self.options.top_k


class HFReplica(RolloutReplica):
    """A transformers model on one device."""

    model: Any = None
    """A ``PreTrainedModel``, once launched."""
    _batching: asyncio.Task[None] | None = None

    async def _launch(self) -> None:
        self._torch_device = torch.device(self.device, 0)
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
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
        self._waiting.append(_Request(prompt, options, options.seed, answer, request_id))
        if self._batching is None or self._batching.done():
            self._batching = asyncio.create_task(self._answer_waiting())
        return await answer

    async def _abort(self, request_ids: Sequence[str]) -> None:
        """A running one ends with its next token, which it keeps."""
        for request in (*self._waiting, *self._running):
            request.aborted |= request.id in request_ids
        for request in self._waiting:
            if request.aborted and not request.answer.done():
                request.answer.set_result(TokenOutput([], [], ABORTED, self.weight_version))

    async def _answer_waiting(self) -> None:
        loop: Any = asyncio.get_running_loop()
        answer = partial(loop.call_soon_threadsafe, _answer)
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            waiting = [request for request in self._waiting if not request.answer.done()]  # cancelled meanwhile
            alike = [request for request in waiting if request.distribution == waiting[0].distribution]
            self._running = batch = alike[: self.config.max_num_seqs]
            self._waiting = [request for request in waiting if request not in batch]
            if not batch:
                continue
            outcome: Any
            # An error comes as a value: it is for these requests, and the loop goes on with the others.
            writing = asyncio.to_thread(self._generate_batch, batch, answer)
            [outcome] = await asyncio.gather(writing, return_exceptions=True)
            for request in batch:
                if isinstance(outcome, BaseException) and not request.answer.done():
                    request.answer.set_exception(outcome)

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[_Request], answer: Callable[[_Request, TokenOutput], Any]) -> None:
        """Write the answers of a batch; ``answer`` is called from this thread as each ends."""
        sampler = _Sampler(batch, self.model_info.vocab_size)
        longest = max(len(request.prompt) for request in batch)
        padding = [longest - len(request.prompt) for request in batch]
        pad = self.model_info.pad_token_id
        ids = [[pad] * width + request.prompt for width, request in zip(padding, batch, strict=True)]
        mask = [[0] * width + [1] * (longest - width) for width in padding]

        def end(row: int, written: list[int]) -> None:
            options, (log_probs, top) = batch[row].options, sampler.of_row(row)
            output = TokenOutput(
                token_ids=written,
                log_probs=log_probs if options.logprobs else None,
                stop_reason=ABORTED if len(written) < options.max_tokens else "length",  # "stop" is set later, by `cut`
                weight_version=self.weight_version,
                top_log_probs=top if options.top_logprobs else None,
            )
            answer(batch[row], output)

        self.model.generate(
            torch.tensor(ids, device=self._torch_device),
            attention_mask=torch.tensor(mask, device=self._torch_device),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=max(request.options.max_tokens for request in batch), pad_token_id=pad
            ),
            logits_processor=transformers.LogitsProcessorList([sampler]),
            stopping_criteria=transformers.StoppingCriteriaList([_RowStops(batch, longest, end)]),
        )

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
        if self._batching is not None:  # the last answers come before its thread has ended
            self._batching.cancel()
            await asyncio.wait([self._batching])
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
        for options, generator in zip(self._options, self._generators, strict=True):
            for _ in range(options.place):  # what the tokens before these were drawn with
                torch.empty(vocab_size).exponential_(generator=generator)
        temperature, top_p, top_k = batch[0].distribution
        self._warpers = transformers.LogitsProcessorList()
        """Empty: the most likely token is taken."""
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

    def of_row(self, row: int) -> tuple[list[float], list[dict[int, float]]]:
        """What `log_probs` and `top` hold of a row."""
        return torch.stack([step[row] for step in self.log_probs]).tolist(), [step[row] for step in self.top]


def _answer(request: _Request, output: TokenOutput) -> None:
    if not request.answer.done():  # its caller was cancelled
        request.answer.set_result(output)


def _likeliest(log_probs: torch.Tensor, drawn: torch.Tensor, options: SamplingOptions) -> dict[int, float]:
    """The likeliest tokens that a row asks for and the drawn one, with log-probs."""
    values, tokens = log_probs.topk(options.top_logprobs)
    return {int(drawn): float(log_probs[drawn]), **dict(zip(tokens.tolist(), values.tolist(), strict=True))}


class _RowStops(transformers.StoppingCriteria):
    """Ends each row at its own stop tokens or token limit, where it is aborted or its caller has gone.

    Args:
        on_end: called once for each row, when it ends, with its number and tokens.
    """

    def __init__(self, batch: Sequence[_Request], prompt_width: int, on_end: Callable[[int, list[int]], None]) -> None:
        self._batch, self._prompt_width, self._on_end = batch, prompt_width, on_end
        self._ended = torch.zeros(len(batch), dtype=torch.bool)
        self._max_tokens = torch.tensor([request.options.max_tokens for request in batch])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Sequences so far (B, P + steps); returns which rows are done, (B,) bool."""
        last = zip(self._batch, input_ids[:, -1].tolist(), strict=True)
        stopped = torch.tensor([request.options.ends_with(token_id) for request, token_id in last])
        full = input_ids.shape[1] - self._prompt_width >= self._max_tokens
        gone = torch.tensor([request.aborted or request.answer.done() for request in self._batch])
        ended = self._ended | stopped | full | gone
        for row in (ended & ~self._ended).nonzero()[:, 0].tolist():
            self._on_end(row, input_ids[row, self._prompt_width :].tolist())
        self._ended = ended
        return ended.to(input_ids.device)

"""Answers of one engine to all questions: greedy, sampled, and as ranked items.

In:  questions and a rollout replica. Out: token ids per question, or items per question. The engine is started once and
sees single requests; which of them it computes together is its own business.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import TypeVar

from tqdm import tqdm

from recipe.onpolicy_distill.scoreboard.items import ItemTrie
from recipe.onpolicy_distill.scoreboard.questions import Question
from recipe.onpolicy_distill.scoreboard.ranking import Ranking, most_likely_items
from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import MAX_TOP_LOGPROBS, get_replica_class

Result = TypeVar("Result")

SEED_STEP = 0x9E3779B1
"""Between the random streams of two seeds: torch's generator on the CPU reads the low 32 bits of a number alone."""
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


class Answerer:
    """One engine, between ``launch`` and ``shutdown``."""

    block_tokens = 32
    """Of the prefix cache on the CPU; vLLM's kernels there take multiples of it."""

    def __init__(self, model: str, rollout: RolloutConfig, device: str) -> None:
        if device == "cpu":
            # vLLM's own blocks there, of 128 tokens, are longer than most prompts, and only whole ones are kept: each
            # request of a ranking would compute its prompt anew.
            options = {"block_size": self.block_tokens, **rollout.engine_kwargs.get("vllm", {})}
            rollout = replace(rollout, engine_kwargs={**rollout.engine_kwargs, "vllm": options})
        self._replica = get_replica_class(rollout.name)(rollout, HFModelConfig(path=model), 0, device)
        self.requests = 0
        """Requests made so far."""

    async def launch(self) -> None:
        """Start the engine."""
        await self._replica.launch()

    async def shutdown(self) -> None:
        """Stop it; safe where it did not start."""
        await self._replica.shutdown()

    async def greedy(self, questions: Sequence[Question], max_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, token by token."""
        sampling = GREEDY | {"max_tokens": max_tokens}
        return await with_progress("greedy answers", [self._write(q.prompt_ids, sampling) for q in questions])

    async def sampled(
        self, questions: Sequence[Question], max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """One draw per prompt from the model's distribution; the same for the same seed."""
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "max_tokens": max_tokens}
        calls = [
            self._write(question.prompt_ids, sampling | {"seed": seed * SEED_STEP + number})
            for number, question in enumerate(questions)
        ]
        return await with_progress("sampled answers", calls)

    async def ranked(self, questions: Sequence[Question], trie: ItemTrie, k: int) -> list[Ranking]:
        """The ``k`` most likely items after each prompt."""
        calls = [most_likely_items([*q.prompt_ids, trie.begin_id], trie, k, self._best_tokens) for q in questions]
        return await with_progress("recommendations", calls)

    async def _write(self, prompt: list[int], sampling: dict[str, float | int]) -> list[int]:
        self.requests += 1
        return (await self._replica.generate(prompt, sampling, f"evaluation-{self.requests}")).token_ids

    async def _best_tokens(self, prompt: list[int], allowed: tuple[int, ...]) -> list[tuple[int, float]]:
        self.requests += 1
        count = min(len(allowed), MAX_TOP_LOGPROBS)
        sampling = GREEDY | {"max_tokens": 1, "top_logprobs": count, "ignore_eos": True, "allowed_token_ids": allowed}
        output = await self._replica.generate(prompt, sampling, f"evaluation-{self.requests}")
        assert output.top_log_probs is not None, "they were asked for"
        return sorted(output.top_log_probs[0].items(), key=lambda entry: -entry[1])


async def with_progress(what: str, calls: Sequence[Awaitable[Result]]) -> list[Result]:
    """All results in order, with a bar on stderr."""
    with tqdm(total=len(calls), desc=what, unit="prompt", leave=False, disable=None) as bar:

        async def counted(call: Awaitable[Result]) -> Result:
            result = await call
            bar.update()
            return result

        return list(await asyncio.gather(*map(counted, calls)))

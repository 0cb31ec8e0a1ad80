"""The transformers engine: an answer does not depend on its batch, and the sampler draws what it should."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import PLAIN, TRUNCATED, generate, save_tiny_model

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.hf_replica import HFReplica, _Request, _RowStops, _Sampler
from verl.workers.rollout.replica import SamplingOptions

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


@pytest.fixture
async def replica(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[HFReplica]:
    save_tiny_model(tmp_path, tiny_tokenizers[1], tied=True)
    config = RolloutConfig(name="hf", prompt_length=16, response_length=12, dtype="float32")
    made = HFReplica(config, HFModelConfig(path=str(tmp_path)), 0, "cpu")
    await made.launch()
    yield made
    await made.shutdown()


async def test_an_answer_depends_on_its_seed_alone(replica: HFReplica) -> None:
    async def write(prompts: Sequence[list[int]], params: dict[str, Any], seed: int = 100) -> list[list[int]]:
        return [output.token_ids for output in await generate(replica, list(prompts), {**params, "seed": seed})]

    together = await write(PROMPTS, PLAIN)
    alone = [(await write([prompt], PLAIN, 100 + row))[0] for row, prompt in enumerate(PROMPTS)]
    mixed, truncated = await asyncio.gather(write(PROMPTS, PLAIN), write(PROMPTS, TRUNCATED))
    assert together == alone == mixed != truncated
    assert await write(PROMPTS, PLAIN, 1) != together


def make_request(seed: int = 0, **options: Any) -> _Request:
    sampling = SamplingOptions(**{"max_tokens": 5} | options)
    return _Request([5], sampling, seed, asyncio.get_running_loop().create_future())


async def test_sampling_frequencies_are_the_probabilities() -> None:
    """4,000 draws from (0.6, 0.3, 0.1): each share within 4 standard deviations."""
    probs = torch.tensor([0.6, 0.3, 0.1])
    sampler = _Sampler([make_request(seed) for seed in range(4000)], vocab_size=3)
    scores = torch.cat([probs.log(), torch.tensor([9.0])]).repeat(4000, 1)  # the last id has no token
    drawn = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
    share = drawn.bincount(minlength=4) / 4000
    assert torch.all((share[:3] - probs).abs() < 4 * (probs * (1 - probs) / 4000).sqrt())
    assert share[3] == 0
    torch.testing.assert_close(sampler.log_probs[0], probs.log()[drawn])


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(-1, 1.0, {0, 1, 2, 3}), (3, 1.0, {0, 1, 3}), (3, 0.6, {1, 3}), (-1, 0.0001, {1})]
)
async def test_truncation_by_hand(top_k: int, top_p: float, kept: set[int]) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05. Top-3 leaves 10/19, 6/19, 3/19, of which top-p 0.6 keeps the first two."""
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    sampler = _Sampler([make_request(seed, top_k=top_k, top_p=top_p) for seed in range(500)], vocab_size=4)
    drawn = sampler(torch.zeros(500, 1, dtype=torch.long), probs.log().repeat(500, 1)).argmax(-1)
    assert set(drawn.tolist()) == kept
    torch.testing.assert_close(sampler.log_probs[0].exp(), probs[drawn] / probs[list(kept)].sum())


async def test_a_row_stops_at_its_own_token_or_limit_or_where_its_caller_has_gone() -> None:
    batch = [make_request(stop_token_ids={6}), make_request(max_tokens=1), make_request(), make_request()]
    ended: list[tuple[int, list[int]]] = []
    stops = _RowStops(batch, prompt_width=1, on_end=lambda row, tokens: ended.append((row, tokens)))
    written, scores = torch.tensor([[5, 6]] * 4), torch.zeros(4, 1)
    assert stops(written, scores).tolist() == [True, True, False, False]
    batch[3].answer.cancel()
    written = torch.tensor([[5, 6, 7]] * 4)
    assert stops(written, scores).tolist() == [True, True, False, True]
    batch[2].aborted = True
    assert stops(written, scores).tolist() == [True] * 4
    assert ended == [(0, [6]), (1, [6]), (3, [6, 7]), (2, [6, 7])], "each once, with its tokens then"

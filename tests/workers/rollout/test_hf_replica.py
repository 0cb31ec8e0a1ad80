"""The transformers engine: its log-probs are the model's, and an answer does not depend on its batch."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rollout_reference import largest_difference, save_tiny_model, train_a_little, weights_of, write_buckets
from transformers import PreTrainedModel

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.hf_replica import HFReplica, _Request, _RowStops, truncate
from verl.workers.rollout.replica import TokenOutput

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
TRUNCATED = {"temperature": 1.1, "top_p": 0.8, "top_k": 20}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


class Engine:
    def __init__(self, model: PreTrainedModel, replica: HFReplica) -> None:
        self.model = model
        self.replica = replica

    async def generate(self, prompts: list[list[int]], params: dict[str, Any]) -> list[TokenOutput]:
        calls = [
            self.replica.generate(prompt, {"logprobs": True, "seed": 100 + prompt[0], **params}, "request")
            for prompt in prompts
        ]
        return await asyncio.gather(*calls)

    def difference(self, params: dict[str, Any], outputs: list[TokenOutput]) -> float:
        return largest_difference(self.model, self.replica.facts.vocab_size, PROMPTS, params, outputs)


@pytest.fixture(params=["tied", "untied"])
async def engine(
    request: pytest.FixtureRequest, tiny_tokenizers: tuple[Path, Path], tmp_path: Path
) -> AsyncIterator[Engine]:
    model = save_tiny_model(tmp_path / "model", tiny_tokenizers[1], tied=request.param == "tied")
    config = RolloutConfig(name="hf", prompt_length=16, response_length=12, dtype="float32")
    replica = HFReplica(config, HFModelConfig(path=str(tmp_path / "model")))
    await replica.launch()
    yield Engine(model, replica)
    await replica.shutdown()


async def test_log_probs_follow_the_weights(engine: Engine, tmp_path: Path) -> None:
    for version in range(3):
        if version:
            train_a_little(engine.model, version)
            await engine.replica.start_weight_update()
            for info in write_buckets(tmp_path / str(version), weights_of(engine.model)):
                await engine.replica.update_weights(info)
            await engine.replica.finish_weight_update(version)
        for params in (PLAIN, TRUNCATED, GREEDY):
            outputs = await engine.generate(PROMPTS, params)
            assert engine.difference(params, outputs) < 1e-4
            assert {output.weight_version for output in outputs} == {version}
            assert max(max(output.token_ids) for output in outputs) < engine.replica.facts.vocab_size


async def test_an_answer_depends_on_its_seed_alone(engine: Engine) -> None:
    together = await engine.generate(PROMPTS, PLAIN)
    alone = [(await engine.generate([prompt], PLAIN))[0] for prompt in PROMPTS]
    mixed = await asyncio.gather(engine.generate(PROMPTS[:2], PLAIN), engine.generate(PROMPTS[2:], TRUNCATED))
    other = await engine.generate(PROMPTS, PLAIN | {"seed": 1})
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.token_ids for output in mixed[0]] == [output.token_ids for output in together[:2]]
    assert [output.token_ids for output in other] != [output.token_ids for output in together]


async def test_answers_stop_where_they_should(engine: Engine) -> None:
    eos = engine.model.config.eos_token_id
    full = await engine.generate(PROMPTS, PLAIN | {"ignore_eos": True})
    assert {(len(output.token_ids), output.stop_reason) for output in full} == {(12, "length")}
    stopped = await engine.generate(PROMPTS, PLAIN | {"allowed_token_ids": [eos]})
    assert [(o.token_ids, o.log_probs, o.stop_reason) for o in stopped] == [([eos], [0.0], "stop")] * 4
    short = await engine.generate(PROMPTS, PLAIN | {"max_tokens": 3, "ignore_eos": True, "logprobs": False})
    assert {(len(output.token_ids), output.log_probs) for output in short} == {(3, None)}


async def test_a_failure_reaches_every_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(engine.replica.model, "generate", generate)
    calls = [engine.replica.generate(prompt, PLAIN, "request") for prompt in PROMPTS]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["hf replica 0 failed: MemoryError: no room"] * 4


def test_sampling_frequencies_are_the_probabilities() -> None:
    """4,000 draws from (0.6, 0.3, 0.1): each share within 4 standard deviations."""
    from verl.workers.rollout.hf_replica import _Sampler
    from verl.workers.rollout.replica import SamplingOptions

    probs = torch.tensor([0.6, 0.3, 0.1])
    options = SamplingOptions(1.0, 1.0, -1, 1, None, True, frozenset(), None)
    sampler = _Sampler([options] * 4000, range(4000), vocab_size=3)
    scores = torch.cat([probs.log(), torch.tensor([9.0])]).repeat(4000, 1)  # the last id has no token
    drawn = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
    share = drawn.bincount(minlength=4) / 4000
    assert torch.all((share[:3] - probs).abs() < 4 * (probs * (1 - probs) / 4000).sqrt())
    assert share[3] == 0
    torch.testing.assert_close(sampler.log_probs[0], probs.log()[drawn])


def test_truncation_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05. Top-3 leaves 10/19, 6/19, 3/19, of which top-p 0.6 keeps the first two."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(4, 1)
    top_k = torch.tensor([4, 3, 3, 4])
    top_p = torch.tensor([1.0, 1.0, 0.6, 0.0001])
    kept = truncate(logits, top_k, top_p).isfinite()
    assert kept.tolist() == [
        [True, True, True, True],
        [True, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
    ]


def test_one_device_only() -> None:
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 .*rollout\.name=hf"):
        HFReplica(RolloutConfig(name="hf", tensor_model_parallel_size=2), HFModelConfig())


async def test_a_row_whose_caller_has_gone_stops(engine: Engine) -> None:
    options = engine.replica._complete({**PLAIN, "ignore_eos": True}, prompt_tokens=1)
    answers = [asyncio.get_running_loop().create_future() for _ in range(2)]
    stops = _RowStops([_Request([5], options, 0, answer) for answer in answers], prompt_width=1)
    written = torch.tensor([[5, 6], [5, 6]])
    assert stops(written, torch.zeros(2, 1)).tolist() == [False, False]
    answers[1].cancel()
    assert stops(written, torch.zeros(2, 1)).tolist() == [False, True]


async def test_a_request_that_was_cancelled_does_not_hold_up_a_weight_sync(engine: Engine) -> None:
    task = asyncio.create_task(engine.generate([[5]], PLAIN))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert engine.replica._requests == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.replica.start_weight_update()

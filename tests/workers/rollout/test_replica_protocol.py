"""What every replica does, whatever its engine: the order of calls, complete sampling parameters, a checked sync."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.fake_replica import END, STALL, FakeReplica

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import SamplingOptions, TokenOutput

EMBED, NORM = {"embed.weight": [4, 2]}, {"norm.weight": [2]}


class Replica(FakeReplica):
    """A launched replica that keeps the options of its requests."""

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        self.options = options
        return await super()._generate(prompt, options, request_id)

    @property
    def events(self) -> list[str]:
        lines = Path(self.config.engine_kwargs["fake"]["log"]).read_text().splitlines()
        return [line.removeprefix("3 ") for line in lines][1:]

    async def load(self, *buckets: dict[str, list[int]]) -> None:
        """A weight sync up to its end, with these shapes by name."""
        await self.start_weight_update()
        for shapes in buckets:
            await self.update_weights({"names": list(shapes), "shapes": list(shapes.values())})

    async def write(self, prompt: tuple[int, ...] = (1,), **params: Any) -> TokenOutput:
        return await self.generate(prompt, params, "request")


async def launch(folder: Path, device: str = "cpu", **options: Any) -> Replica:
    log = {"fake": {"log": str(folder / "log")}}
    config = RolloutConfig(prompt_length=20, response_length=10, engine_kwargs=log, **options)
    replica = Replica(config, HFModelConfig(), 3, device)
    await replica.launch()
    return replica


async def test_what_a_request_leaves_out_comes_from_the_config(tmp_path: Path) -> None:
    replica = await launch(tmp_path, temperature=1.1, top_p=0.9, top_k=5)
    await replica.write()
    assert replica.options == SamplingOptions(1.1, 0.9, 5, 10, stop_token_ids=frozenset({END}))
    await replica.write(temperature=0, max_tokens=4, seed=9, ignore_eos=True)
    assert replica.options == SamplingOptions(0, 0.9, 5, 4, ignore_eos=True, seed=9, stop_token_ids=frozenset())
    await replica.write((1,) * 27, stop_token_ids=[5], logprobs=True, allowed_token_ids=[4])
    expected = {"logprobs": True, "stop_token_ids": frozenset({5, END}), "allowed_token_ids": [4]}
    assert replica.options == SamplingOptions(1.1, 0.9, 5, 3, **expected), "20 + 10 - 27 tokens are left"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "the prompt is empty"),
        ((1,) * 30, {}, "30 tokens, which leaves none for an answer in max_model_len=30"),
        ((1, 205), {}, "token ids from 1 to 205; .* names 0 to 199"),
        ((1,), {"n": 2}, r"\['n'\] are unknown; use temperature, top_p"),
        ((1,), {"temperature": -0.1}, "temperature=-0.1 must not be negative"),
        ((1,), {"top_p": 0.0}, "top_p=0.0 must lie in"),
        ((1,), {"top_k": 0}, "top_k=0 must be -1"),
        ((1,), {"top_logprobs": 21}, "top_logprobs=21 must lie in"),
        ((1,), {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ((1,), {"seed": 2**63}, "seed=9223372036854775808 must lie in"),
        ((1,), {"allowed_token_ids": []}, "at least one id, all of them from 0 to 199"),
        ((1,), {"allowed_token_ids": [3, 200]}, "at least one id, all of them from 0 to 199"),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why(
    prompt: tuple[int, ...], params: dict[str, Any], message: str, tmp_path: Path
) -> None:
    replica = await launch(tmp_path)
    with pytest.raises(ValueError, match=message):
        await replica.write(prompt, **params)


async def test_a_sync_in_buckets_sets_the_version(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.load(EMBED, NORM)
    with pytest.raises(RuntimeError, match="in the middle of a weight sync"):
        await replica.write()
    await replica.finish_weight_update(5)
    assert replica.events == ["start", "load embed.weight", "load norm.weight", "finish"]
    assert (await replica.write()).weight_version == 5


async def test_a_sync_that_does_not_match_is_finished_reported_and_barred_from_use(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.load(EMBED, EMBED | {"Norm.weight": [2], "head.weight": [3, 2]})
    with pytest.raises(ValueError) as error:
        await replica.finish_weight_update(2)
    assert str(error.value) == (
        "vllm replica 3: weight sync 2 does not match the model: missing: norm.weight; unknown: Norm.weight; "
        "reshaped: head.weight [3, 2] instead of [4, 2]; sent twice: embed.weight"
    )
    assert replica.events == ["start", "load embed.weight", "finish"]
    assert replica.weight_version == 0
    with pytest.raises(RuntimeError, match="weight sync 2 was incomplete"):
        await replica.write()


async def test_syncs_and_requests_do_not_overlap(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    for call in (replica.update_weights({"names": []}), replica.finish_weight_update(1)):
        with pytest.raises(RuntimeError, match="before start_weight_update"):
            await call
    request = asyncio.create_task(replica.write((STALL,)))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="start_weight_update while 1 requests are under way"):
        await replica.start_weight_update()
    request.cancel()
    await asyncio.wait([request])
    await replica.load(EMBED)
    await replica.load(EMBED, NORM)  # begins anew where the last sync did not end
    await replica.finish_weight_update(2)
    assert (await replica.write()).weight_version == 2


async def test_on_a_gpu_a_sync_wakes_a_sleeping_engine(tmp_path: Path) -> None:
    replica = await launch(tmp_path, "cuda")
    await replica.sleep()
    await replica.sleep()
    with pytest.raises(RuntimeError, match="sleeps without weights"):
        await replica.write()
    await replica.load(EMBED | NORM)
    await replica.finish_weight_update(1)
    await replica.write()
    assert replica.events == ["sleep", "wake weights", "start", "load embed.weight norm.weight", "finish"]


@pytest.mark.parametrize(("device", "free"), [("cpu", True), ("cuda", False)])
async def test_no_sleep_on_cpu_or_where_it_is_off(device: str, free: bool, tmp_path: Path) -> None:
    replica = await launch(tmp_path, device, free_cache_engine=free)
    await replica.sleep()
    assert replica.events == []


async def test_nothing_is_generated_after_shutdown(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.shutdown()
    with pytest.raises(RuntimeError, match="it was shut down"):
        await replica.write()

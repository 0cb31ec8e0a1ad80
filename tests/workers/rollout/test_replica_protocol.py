"""What every replica does, whatever its engine: the order of calls, complete sampling parameters, a checked sync."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.fake_replica import END, STALL, FakeReplica

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import ABORTED, SamplingOptions, TokenOutput

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
        return await self.generate(prompt, {"max_tokens": 10, **params}, "request")


async def launch(folder: Path, device: str = "cpu") -> Replica:
    log = {"fake": {"log": str(folder / "log")}}
    config = RolloutConfig(prompt_length=20, response_length=10, engine_kwargs=log)
    replica = Replica(config, HFModelConfig(), 3, device)
    await replica.launch()
    return replica


async def test_a_request_gets_the_models_end_tokens_and_what_is_left_of_its_length(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.write(temperature=0, seed=9)
    assert replica.options == SamplingOptions(10, temperature=0, seed=9, stop_token_ids=frozenset({END}))
    await replica.write((1,) * 27, stop_token_ids=[5])
    assert replica.options.max_tokens == 3, "20 + 10 - 27 tokens are left"
    assert replica.options.stop_token_ids == frozenset({5, END})
    assert replica.options.seed is not None
    await replica.write(ignore_eos=True)
    assert replica.options.stop_token_ids == frozenset()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "of 0 tokens .* must hold 1 to 29 tokens"),
        ((1,) * 30, "of 30 tokens .* must hold 1 to 29 tokens"),
        ((1, 205), "ids up to 205: .* ids from 0 to 199"),
    ],
)
async def test_a_prompt_that_cannot_be_answered_says_why(prompt: tuple[int, ...], message: str, tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    with pytest.raises(ValueError, match=message):
        await replica.write(prompt)


async def test_a_sync_that_does_not_match_is_finished_reported_and_barred_from_use(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.load(EMBED, EMBED | {"Norm.weight": [2], "norm.weight": [3]})
    with pytest.raises(ValueError) as error:
        await replica.finish_weight_update(2)
    assert str(error.value) == (
        "vllm replica 3: weight sync 2 does not match the model: sent twice: embed.weight; unknown: Norm.weight; "
        "reshaped: norm.weight [3] instead of [2]"
    )
    assert replica.events == ["start", "load embed.weight", "finish"]
    assert replica.weight_version == 0
    with pytest.raises(RuntimeError, match="weight sync 2 was incomplete"):
        await replica.write()


async def test_a_bucket_that_is_broadcast_and_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    """The sender waits until all have received it."""
    replica = await launch(tmp_path)
    await replica.load(EMBED)
    with pytest.raises(ValueError, match=r"vllm replica 3: a weight bucket does not fit: unknown: none"):
        await replica.update_weights({"names": ["none"], "shapes": [[1]], "dtype_names": ["float32"]})


async def test_syncs_and_requests_do_not_overlap(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    request = asyncio.create_task(replica.write((STALL,)))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="a weight sync while 1 requests are under way"):
        await replica.start_weight_update()
    with pytest.raises(RuntimeError, match="put to sleep while 1 requests are under way"):
        await replica.sleep()
    request.cancel()
    await asyncio.wait([request])
    await replica.load(EMBED)
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        await replica.finish_weight_update(1)
    await replica.load(EMBED)
    await replica.load(EMBED, NORM)  # begins anew where the last sync did not end
    with pytest.raises(RuntimeError, match="in the middle of a weight sync"):
        await replica.write()
    await replica.finish_weight_update(2)
    assert (await replica.write()).weight_version == 2


async def test_nothing_is_generated_after_shutdown(tmp_path: Path) -> None:
    replica = await launch(tmp_path)
    await replica.shutdown()
    with pytest.raises(RuntimeError, match="it was shut down"):
        await replica.write()


async def test_requests_that_are_begun_together_are_answered_once_cancelled_or_cut_short(tmp_path: Path) -> None:
    replica, params = await launch(tmp_path), {"max_tokens": 10}
    new = [((STALL,), params, "cut"), ((STALL,), params, "left"), ((1,), params, "done")]
    # In the same moment: the request is not with the engine yet.
    first, _ = await asyncio.gather(replica.answers(new, ["cut", "left", "done"]), replica.abort(["cut"]))
    assert first["cut"].stop_reason == ABORTED and "left" not in first
    rest = first if "done" in first else await replica.answers([], ["left", "done"])
    assert rest["done"].stop_reason == "stop"
    waiting = asyncio.create_task(replica.answers([], ["left"]))
    await asyncio.sleep(0)
    await replica.cancel(["left"])
    assert await waiting == {} and await replica.answers([], ["left"]) == {}
    await replica.start_weight_update()  # nothing is under way

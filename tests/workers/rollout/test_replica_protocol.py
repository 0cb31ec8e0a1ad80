"""What every replica does, whatever its engine: the order of calls, complete sampling parameters, a checked sync."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import write_buckets

from verl.config import HFModelConfig, RolloutConfig
from verl.weight_sync.receive import WeightShapes
from verl.workers.rollout.model_info import ModelInfo
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput, get_replica_class

MODEL = ModelInfo(
    vocab_size=90,
    vocab_rows=100,
    eos_token_ids=(7, 8),
    pad_token_id=0,
    weights=WeightShapes({"embed": (100, 4), "norm": (4,), "head": (100, 4)}, aliases=frozenset({"head"})),
)


class ScriptedReplica(RolloutReplica):
    """Records what it has to do."""

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        super().__init__(RolloutConfig(prompt_length=20, response_length=10, **options), HFModelConfig(), 3, device)
        self._model_info = MODEL
        self.calls: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def _launch(self) -> None:
        self.calls.append("launch")

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        await self.gate.wait()
        self.calls.append((prompt, options))
        return TokenOutput([1], None, "length", self.weight_version)

    async def _start_update(self) -> None:
        self.calls.append("start asleep" if self._asleep else "start")

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        self.calls.append(("load", update_info["names"]))

    async def _finish_update(self) -> None:
        self.calls.append("finish")

    async def _sleep(self) -> None:
        self.calls.append("sleep")

    async def _shutdown(self) -> None:
        self.calls.append("shutdown")


def bucket(**shapes: list[int]) -> dict[str, Any]:
    return {"names": list(shapes), "shapes": list(shapes.values()), "dtype_names": [], "ipc_handles": []}


async def test_what_a_request_leaves_out_comes_from_the_config() -> None:
    replica = ScriptedReplica(temperature=1.1, top_p=0.9, top_k=5)
    await replica.generate([1, 2], {}, "a")
    await replica.generate([1, 2], {"temperature": 0, "max_tokens": 4, "seed": 9, "ignore_eos": True}, "b")
    await replica.generate([1] * 27, {"stop_token_ids": [5], "logprobs": True, "allowed_token_ids": [4]}, "c")
    first, second, third = (options for _, options in replica.calls)
    assert first == SamplingOptions(1.1, 0.9, 5, 10, stop_token_ids=frozenset({7, 8}))
    assert second == SamplingOptions(0.0, 0.9, 5, 4, ignore_eos=True, seed=9, stop_token_ids=frozenset())
    # 20 + 10 - 27 tokens are left.
    ids = {"stop_token_ids": frozenset({5, 7, 8}), "allowed_token_ids": [4]}
    assert third == SamplingOptions(1.1, 0.9, 5, 3, logprobs=True, **ids)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 30, {}, "30 tokens, which leaves none for an answer in max_model_len=30"),
        ([1, 95], {}, "token ids from 1 to 95; .* names 0 to 89"),
        ([1], {"n": 2}, r"\['n'\] are unknown; use temperature, top_p"),
        ([1], {"temperature": -0.1}, "temperature=-0.1 must not be negative"),
        ([1], {"top_p": 0.0}, "top_p=0.0 must lie in"),
        ([1], {"top_k": 0}, "top_k=0 must be -1"),
        ([1], {"top_logprobs": 21}, "top_logprobs=21 must lie in"),
        ([1], {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ([1], {"seed": 2**63}, "seed=9223372036854775808 must lie in"),
        ([1], {"allowed_token_ids": []}, "at least one id, all of them from 0 to 89"),
        ([1], {"allowed_token_ids": [3, 90]}, "at least one id, all of them from 0 to 89"),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why(
    prompt: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await ScriptedReplica().generate(prompt, params, "a")


async def test_a_sync_in_buckets_sets_the_version() -> None:
    replica = ScriptedReplica()
    await replica.start_weight_update()
    await replica.update_weights(bucket(embed=[100, 4]))
    await replica.update_weights(bucket(norm=[4]))  # the tied head need not come
    await replica.finish_weight_update(5)
    assert replica.calls == ["start", ("load", ["embed"]), ("load", ["norm"]), "finish"]
    assert (await replica.generate([1], {}, "a")).weight_version == 5


async def test_a_sync_that_does_not_match_is_finished_reported_and_barred_from_use() -> None:
    replica = ScriptedReplica()
    await replica.start_weight_update()
    await replica.update_weights(bucket(embed=[100, 4]))
    await replica.update_weights(bucket(embed=[100, 4], Norm=[4], head=[99, 4]))
    with pytest.raises(ValueError) as error:
        await replica.finish_weight_update(2)
    assert str(error.value) == (
        "vllm replica 3: weight sync 2 does not match the model: missing: norm; unknown: Norm; "
        "reshaped: head [99, 4] instead of [100, 4]; sent twice: embed"
    )
    assert replica.calls == ["start", ("load", ["embed"]), "finish"]
    assert replica.weight_version == 0
    with pytest.raises(RuntimeError, match="weight sync 2 was incomplete"):
        await replica.generate([1], {}, "a")


async def test_syncs_and_requests_do_not_overlap() -> None:
    replica = ScriptedReplica()
    replica.gate.clear()
    request = asyncio.create_task(replica.generate([1], {}, "a"))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="start_weight_update while 1 requests are under way"):
        await replica.start_weight_update()
    replica.gate.set()
    await request
    for call in (replica.update_weights(bucket()), replica.finish_weight_update(1)):
        with pytest.raises(RuntimeError, match="before start_weight_update"):
            await call
    await replica.start_weight_update()
    with pytest.raises(RuntimeError, match="in the middle of a weight sync"):
        await replica.generate([1], {}, "a")
    await replica.start_weight_update()
    await replica.update_weights(bucket(embed=[100, 4], norm=[4]))
    await replica.finish_weight_update(2)
    assert (await replica.generate([1], {}, "a")).weight_version == 2, "a sync may begin where the last one failed"


async def test_on_a_gpu_a_sync_wakes_a_sleeping_engine() -> None:
    replica = ScriptedReplica("cuda")
    await replica.sleep()
    await replica.sleep()
    with pytest.raises(RuntimeError, match="sleeps without weights"):
        await replica.generate([1], {}, "a")
    await replica.start_weight_update()
    await replica.update_weights(bucket(embed=[100, 4], norm=[4]))
    await replica.finish_weight_update(1)
    await replica.generate([1], {}, "a")
    assert replica.calls[:-1] == ["sleep", "start asleep", ("load", ["embed", "norm"]), "finish"]


@pytest.mark.parametrize(("device", "free"), [("cpu", True), ("cuda", False)])
async def test_no_sleep_on_cpu_or_where_it_is_off(device: str, free: bool) -> None:
    replica = ScriptedReplica(device, free_cache_engine=free)
    await replica.sleep()
    assert replica.calls == []


async def test_a_bucket_file_must_hold_the_names_it_claims(tmp_path: Path) -> None:
    tensors = {"embed": torch.zeros(100, 4), "norm": torch.zeros(4)}
    replica = ScriptedReplica()
    await replica.start_weight_update()
    for info in write_buckets(tmp_path, tensors, tensors_per_bucket=1):
        await replica.update_weights(info)
    await replica.finish_weight_update(1)
    assert replica.calls[1:3] == [("load", ["embed"]), ("load", ["norm"])]


async def test_nothing_is_generated_after_shutdown() -> None:
    replica = ScriptedReplica()
    await replica.shutdown()
    with pytest.raises(RuntimeError, match="it was shut down"):
        await replica.generate([1], {}, "a")


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ValueError, match=r"rollout.name='sglang' is unknown; use vllm or hf"):
        get_replica_class("sglang")

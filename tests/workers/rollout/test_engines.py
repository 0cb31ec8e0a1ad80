"""The real engines on CPU: after every weight sync their log-probs are those of the model that was sent."""

import asyncio
import base64
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import GREEDY, PLAIN, TRUNCATED, WARM, Engine, check_carried, generate, sync, write_buckets

from verl.workers.rollout.replica import RolloutReplica

TOLERANCE = 1e-4
VLLM = "vllm tied qwen3"


@pytest.fixture(scope="module", params=[VLLM, "vllm untied qwen2", "hf tied qwen3", "hf untied qwen2"])
def engine(
    request: pytest.FixtureRequest, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    name, tied, architecture = request.param.split()
    made = Engine(name, tmp_path_factory.mktemp(name), tiny_tokenizers[1], tied == "tied", architecture)
    yield made
    made.replica.close()


def test_log_probs_follow_the_weights_over_syncs(engine: Engine) -> None:
    for params in (PLAIN, TRUNCATED, GREEDY):
        assert engine.difference(params) < TOLERANCE
    for seed in range(3):
        stale = engine.generate(PLAIN)
        engine.train_a_little(seed)
        engine.sync()
        assert engine.difference(PLAIN, stale) > 100 * TOLERANCE
        for params in (PLAIN, WARM, TRUNCATED, GREEDY):
            assert engine.difference(params) < TOLERANCE
        assert {output.weight_version for output in engine.generate(PLAIN)} == {engine.version}


@pytest.mark.slow
def test_experts_follow_the_weights_over_syncs_from_none_on(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"engine_kwargs": {"vllm": {"load_format": "dummy"}}}
    engine = Engine("vllm", tmp_path, tiny_tokenizers[1], False, "qwen3_moe", **options)
    with pytest.raises(RuntimeError, match="cannot generate: it was started without weights"):
        engine.generate(PLAIN)
    for seed in range(3):
        engine.train_a_little(seed)
        engine.sync()
        assert engine.difference(PLAIN) < 1e-5
    engine.replica.close()


def test_a_sync_that_does_not_match_the_model_lists_every_tensor(engine: Engine) -> None:
    engine.train_a_little(99)
    wrong = dict(engine.model.named_parameters())
    del wrong["model.layers.0.self_attn.k_proj.weight"]
    wrong["model.layers.1.mlp.up.weight"] = wrong.pop("model.layers.1.mlp.up_proj.weight")
    wrong["model.norm.weight"] = torch.ones(65)
    with pytest.raises(ValueError) as error:
        engine.sync(wrong)
    message = str(error.value)
    assert "missing: model.layers.0.self_attn.k_proj.weight; missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unknown: model.layers.1.mlp.up.weight" in message
    assert "reshaped: model.norm.weight [65] instead of [64]" in message
    with pytest.raises(RuntimeError, match=r"cannot generate: weight sync .* was incomplete"):
        engine.generate(PLAIN)
    engine.sync()
    assert engine.difference(PLAIN) < TOLERANCE


async def sync_without(replica: RolloutReplica, layer: str, buckets: list[dict[str, Any]], version: int) -> None:
    """A sync of all tensors, of which vLLM drops those of a layer, as some models' loaders do with names they lack."""
    from verl.workers.rollout import vllm_worker

    read = vllm_worker.bucket_tensors
    vllm_worker.bucket_tensors = lambda *given: (tensor for tensor in read(*given) if layer not in tensor[0])
    try:
        await sync(replica, buckets, version)
    finally:
        vllm_worker.bucket_tensors = read


@pytest.mark.parametrize("engine", [VLLM], indirect=True)
def test_a_layer_that_the_engine_drops_is_named(engine: Engine, tmp_path: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"
    buckets = write_buckets(tmp_path, dict(engine.model.named_parameters()))
    with pytest.raises(ValueError, match=f"weight sync 50 does not match the model: got no weights: {layer}$"):
        engine.replica.run(sync_without, layer, buckets, 50)
    with pytest.raises(RuntimeError, match="cannot generate: weight sync 50 was incomplete"):
        engine.generate(PLAIN)
    engine.sync()
    assert engine.difference(PLAIN) < TOLERANCE


def test_ids_without_a_token_are_never_sampled(engine: Engine) -> None:
    outputs = engine.generate(PLAIN, ignore_eos=True)
    assert max(max(output.token_ids) for output in outputs) < engine.vocab_size
    logits = engine.model(torch.tensor([engine.prompts[0]])).logits[0, -1]
    assert int(logits.argmax()) >= engine.vocab_size, "the padded rows must be the likeliest, or this tests nothing"


def test_equal_seeds_give_equal_answers(engine: Engine) -> None:
    first, second, other = (engine.generate(PLAIN, seed=seed) for seed in (0, 0, 1000))
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert [output.token_ids for output in first] != [output.token_ids for output in other]
    [alone] = engine.replica.run(generate, engine.prompts[3:4], {**PLAIN, "seed": 3})
    assert alone.token_ids == first[3].token_ids


def test_answers_stop_where_they_should(engine: Engine) -> None:
    eos = engine.model.config.eos_token_id
    full = engine.generate(PLAIN, ignore_eos=True)
    assert {(len(output.token_ids), output.stop_reason) for output in full} == {(24, "length")}
    # Only one token may be written, so the first is it, and it ends the answer.
    stopped = engine.generate(PLAIN, allowed_token_ids=[eos])
    assert [(output.token_ids, output.stop_reason) for output in stopped] == [([eos], "stop")] * 6
    own = engine.generate(PLAIN, allowed_token_ids=[7], stop_token_ids=[7], ignore_eos=True)
    assert [(output.token_ids, output.log_probs) for output in own] == [([7], [0.0])] * 6
    short = engine.generate(PLAIN, max_tokens=3, ignore_eos=True, logprobs=False)
    assert {(len(output.token_ids), output.log_probs) for output in short} == {(3, None)}


def test_answers_end_at_their_first_token_from_an_id_on(engine: Engine) -> None:
    start = engine.vocab_size - 60
    whole, cut = engine.generate(PLAIN), engine.generate(PLAIN, stop_from_id=start)
    assert any(max(output.token_ids[:-1]) >= start for output in whole), "or this tests nothing"
    for full, output in zip(whole, cut, strict=True):
        end = next((n for n, token in enumerate(full.token_ids, 1) if token >= start), len(full.token_ids))
        assert output.token_ids == full.token_ids[:end]
        assert output.log_probs == pytest.approx((full.log_probs or [])[:end], abs=1e-5)
        assert output.stop_reason == ("stop" if end < len(full.token_ids) else full.stop_reason)


def test_the_likeliest_tokens_come_with_the_drawn_one(engine: Engine) -> None:
    for output in engine.generate(PLAIN, top_logprobs=3, max_tokens=4):
        for token_id, log_prob, likeliest in zip(
            output.token_ids, output.log_probs or [], output.top_log_probs or [], strict=True
        ):
            assert likeliest[token_id] == log_prob
            assert len(likeliest) in (3, 4)


def test_cancelled_requests_leave_nothing_behind(engine: Engine) -> None:
    assert engine.replica.run(cancel_requests, engine.prompts) == 6
    engine.sync()  # refused while a request is under way
    assert engine.difference(PLAIN) < TOLERANCE


async def cancel_requests(replica: RolloutReplica, prompts: list[list[int]]) -> int:
    tasks = [
        asyncio.create_task(replica.generate(prompt, {"max_tokens": 24, "ignore_eos": True}, "gone"))
        for prompt in prompts
    ]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


def test_answers_that_are_cut_and_carried_on_are_those_written_in_one_go(engine: Engine) -> None:
    check_carried(engine)
    engine.sync()  # refused while a request is under way
    assert engine.difference(PLAIN) < TOLERANCE


class FakeGPUEngine:
    """Records what is called of ``AsyncLLM``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((method, *arguments, *options.values()))
            return [] if method == "collective_rpc" else True

        return call


async def sync_on_gpu(replica: RolloutReplica, handles: list[Any]) -> list[Any]:
    """What a replica on a GPU has vLLM do, from sleep to the end of a sync."""
    on_gpu = type(replica)(replica.config, replica.model_config, 0, "cuda")
    on_gpu.model_info = dataclasses.replace(replica.model_info, weights={"norm": (4,)})
    on_gpu._engine = FakeGPUEngine()
    await on_gpu.sleep()
    await on_gpu.start_weight_update()
    await on_gpu.update_weights(
        {"names": ["norm"], "dtype_names": ["float32"], "shapes": [[4]], "ipc_handles": handles}
    )
    await on_gpu.finish_weight_update(1)
    return on_gpu._engine.calls


@pytest.mark.parametrize("engine", [VLLM], indirect=True)
def test_the_order_of_a_sync_on_a_gpu(engine: Engine) -> None:
    handles = [{"GPU-1": (torch.Tensor, (4,), b"handle")}]
    calls = engine.replica.run(sync_on_gpu, handles)
    assert calls[:3] == [("sleep", 2), ("wake_up", ["weights"]), ("collective_rpc", "start_weight_update", {})]
    finish = ("collective_rpc", "finish_and_find_unloaded", {})
    assert calls[4:] == [finish, ("wake_up", ["kv_cache"]), ("reset_prefix_cache",)]
    *method, kwargs = calls[3]
    bucket = kwargs["update_info"]
    assert method == ["collective_rpc", "update_weights"]
    assert pickle.loads(base64.b64decode(bucket.pop("ipc_handles_pickled"))) == handles
    assert bucket == {"names": ["norm"], "dtype_names": ["float32"], "shapes": [[4]]}


def test_weights_that_are_broadcast_arrive(engine: Engine) -> None:
    """The last sync of this engine: it is in the channel from now on."""
    engine.train_a_little(7)
    engine.broadcast()
    assert engine.difference(PLAIN) < TOLERANCE
    assert {output.weight_version for output in engine.generate(PLAIN)} == {engine.version}


def test_an_engine_that_fails_names_the_cause(engine: Engine) -> None:
    # The last test: vLLM's engine does not survive.
    engine.replica.run(break_engine)
    for _ in range(2):
        with pytest.raises((RuntimeError, MemoryError), match="out of blocks"):
            engine.generate(PLAIN)
    if engine.name == "vllm":
        with pytest.raises(RuntimeError, match="engine is dead: MemoryError: out of blocks"):
            engine.replica.run(check_alive)


async def break_engine(replica: RolloutReplica) -> None:
    def step(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("out of blocks")

    if replica.config.name == "vllm":
        replica._engine._engine.step = step
    else:
        replica.model.generate = step


async def check_alive(replica: RolloutReplica) -> None:
    await replica.check_alive()

"""The real vLLM on CPU: after every weight sync its log-probs are those of the model that was sent."""

import asyncio
import base64
import dataclasses
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.replica_process import ReplicaProcess
from support.rollout_reference import (
    largest_difference,
    save_tiny_model,
    train_a_little,
    weights_of,
    write_buckets,
)
from transformers import AutoTokenizer, PreTrainedModel

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.model_facts import WeightManifest
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.vllm_replica import VLLMReplica, unblock_sigterm

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
WARM = {"temperature": 1.1, "top_p": 1.0, "top_k": -1}
TRUNCATED = {"temperature": 1.1, "top_p": 0.9, "top_k": 30}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
TOLERANCE = 1e-4


def rollout_config(**changes: Any) -> RolloutConfig:
    options: dict[str, Any] = {"prompt_length": 200, "response_length": 24, "max_num_seqs": 16}
    return RolloutConfig(**options | {"cpu_kvcache_space_gb": 0.1} | changes)


def hears_sigterm() -> bool:
    """Whether a process that is started now does."""
    code = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_processes_of_the_engine_heed_what_ends_them_though_the_replica_does_not() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert not hears_sigterm()
        with unblock_sigterm():
            assert hears_sigterm()
        assert not hears_sigterm()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def generate(
    replica: RolloutReplica, prompts: list[list[int]], params: dict[str, Any], seed: int = 0
) -> list[TokenOutput]:
    calls = [
        replica.generate(prompt, {"logprobs": True, "seed": seed + row, **params}, f"request-{row}")
        for row, prompt in enumerate(prompts)
    ]
    return await asyncio.gather(*calls)


async def sync(replica: RolloutReplica, buckets: list[dict[str, Any]], version: int) -> None:
    await replica.start_weight_update()
    for bucket in buckets:
        await replica.update_weights(bucket)
        Path(bucket["path"]).unlink()
    await replica.finish_weight_update(version)


async def cancel_requests(replica: RolloutReplica, prompts: list[list[int]]) -> int:
    tasks = [asyncio.create_task(replica.generate(prompt, {"ignore_eos": True}, "gone")) for prompt in prompts]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


class FakeGPUEngine:
    """The methods of ``AsyncLLM`` that a sync on CUDA uses."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.calls.append((method, kwargs))

    async def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    async def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True


async def sync_on_gpu(replica: RolloutReplica, handles: list[Any]) -> list[Any]:
    """What a replica on a GPU asks of vLLM, from sleep to the end of a sync."""
    on_gpu = VLLMReplica(replica.config, replica.model_config, device="cuda")
    weights = WeightManifest({"norm": (4,)}, frozenset())
    on_gpu._facts = dataclasses.replace(replica.facts, weights=weights)
    on_gpu._engine = engine = FakeGPUEngine()
    await on_gpu.sleep()
    await on_gpu.start_weight_update()
    info = {"names": ["norm"], "dtype_names": ["float32"], "shapes": [[4]], "ipc_handles": handles}
    await on_gpu.update_weights(info)
    await on_gpu.finish_weight_update(1)
    return engine.calls


async def kill_engine_processes(replica: RolloutReplica) -> None:
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


async def check_alive(replica: RolloutReplica) -> None:
    await replica.check_alive()


async def wait_for_death(replica: RolloutReplica) -> None:
    """Look now and then, as a run does, while nothing is asked of the engine."""
    async with asyncio.timeout(30):
        while True:
            await replica.check_alive()
            await asyncio.sleep(0.2)


async def descendants(replica: RolloutReplica) -> list[int]:
    return [process.pid for process in psutil.Process().children(recursive=True)]


async def break_engine(replica: RolloutReplica) -> None:
    def step() -> None:
        raise MemoryError("out of blocks")

    replica._engine._engine.step = step


class Engine:
    """A started replica beside the model it was given."""

    def __init__(
        self, folder: Path, tokenizer_dir: Path, tied: bool, architecture: str = "qwen3", **options: Any
    ) -> None:
        self.folder = folder
        self.model: PreTrainedModel = save_tiny_model(folder / "model", tokenizer_dir, tied, architecture)
        self.vocab_size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
        self.eos = self.model.config.eos_token_id
        self.version = 0
        # Longer than one cache block of 128 tokens, so that the prefix cache takes part.
        shared = [3 + i % 50 for i in range(150)]
        self.prompts = [[*shared, *range(10 + row, 20 + 2 * row)] for row in range(6)]
        self.replica = ReplicaProcess(rollout_config(**options), HFModelConfig(path=str(folder / "model")))

    def generate(self, params: dict[str, Any], **options: Any) -> list[TokenOutput]:
        return self.replica.run(generate, self.prompts, {**params, **options})

    def sync(self, tensors: dict[str, torch.Tensor]) -> None:
        self.version += 1
        buckets = write_buckets(self.folder / f"version-{self.version}", tensors)
        self.replica.run(sync, buckets, self.version)

    def difference(self, params: dict[str, Any]) -> float:
        return largest_difference(self.model, self.vocab_size, self.prompts, params, self.generate(params))


@pytest.fixture(scope="module", params=["tied qwen3", "untied qwen2"])
def engine(
    request: pytest.FixtureRequest, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    tied, architecture = request.param.split()
    engine = Engine(tmp_path_factory.mktemp(architecture), tiny_tokenizers[1], tied == "tied", architecture)
    yield engine
    engine.replica.close()


def test_log_probs_are_the_model_s_before_any_sync(engine: Engine) -> None:
    for params in (PLAIN, TRUNCATED, GREEDY):
        assert engine.difference(params) < TOLERANCE


def test_log_probs_follow_the_weights_over_five_syncs(engine: Engine) -> None:
    for seed in range(5):
        stale = engine.generate(PLAIN)
        train_a_little(engine.model, seed)
        engine.sync(weights_of(engine.model))
        assert largest_difference(engine.model, engine.vocab_size, engine.prompts, PLAIN, stale) > 100 * TOLERANCE
        for params in (PLAIN, WARM, TRUNCATED, GREEDY):
            assert engine.difference(params) < TOLERANCE
        assert {output.weight_version for output in engine.generate(PLAIN)} == {engine.version}


def test_a_sync_that_does_not_match_the_model_lists_every_tensor(engine: Engine) -> None:
    train_a_little(engine.model, 99)
    tensors = weights_of(engine.model)
    wrong = dict(tensors)
    del wrong["model.layers.0.self_attn.k_proj.weight"]
    wrong["model.layers.1.mlp.up.weight"] = wrong.pop("model.layers.1.mlp.up_proj.weight")
    wrong["model.norm.weight"] = torch.ones(65)
    with pytest.raises(ValueError) as error:
        engine.sync(wrong)
    message = str(error.value)
    missing = "missing: model.layers.0.self_attn.k_proj.weight, model.layers.1.mlp.up_proj.weight"
    assert missing in message
    assert "unknown: model.layers.1.mlp.up.weight" in message
    assert "reshaped: model.norm.weight [65] instead of [64]" in message
    with pytest.raises(RuntimeError, match=r"cannot generate: weight sync .* was incomplete"):
        engine.generate(PLAIN)
    engine.sync(tensors)
    assert engine.difference(PLAIN) < TOLERANCE


def test_ids_without_a_token_are_never_sampled(engine: Engine) -> None:
    outputs = engine.generate(PLAIN, ignore_eos=True)
    assert max(max(output.token_ids) for output in outputs) < engine.vocab_size
    logits = engine.model(torch.tensor([engine.prompts[0]])).logits[0, -1]
    assert int(logits.argmax()) >= engine.vocab_size, "the padded rows must be the likeliest, or this tests nothing"


def test_equal_seeds_give_equal_answers(engine: Engine) -> None:
    first, second = engine.generate(PLAIN), engine.generate(PLAIN)
    other = engine.replica.run(generate, engine.prompts, PLAIN, 1000)
    assert [output.token_ids for output in first] == [output.token_ids for output in second]
    assert [output.token_ids for output in first] != [output.token_ids for output in other]


def test_answers_stop_where_they_should(engine: Engine) -> None:
    full = engine.generate(PLAIN, ignore_eos=True)
    assert {(len(output.token_ids), output.stop_reason) for output in full} == {(24, "length")}
    # Only one token may be written, so the first is it, and it ends the answer.
    stopped = engine.generate(PLAIN, allowed_token_ids=[engine.eos])
    assert [(output.token_ids, output.stop_reason) for output in stopped] == [([engine.eos], "stop")] * 6
    own = engine.generate(PLAIN, allowed_token_ids=[7], stop_token_ids=[7], ignore_eos=True)
    assert [(output.token_ids, output.log_probs) for output in own] == [([7], [0.0])] * 6
    short = engine.generate(PLAIN, max_tokens=3, ignore_eos=True, logprobs=False)
    assert {(len(output.token_ids), output.log_probs) for output in short} == {(3, None)}


def test_requests_that_cannot_be_answered_are_refused_and_the_engine_goes_on(engine: Engine) -> None:
    for prompt, params, message in [
        ([], PLAIN, "empty"),
        ([1] * 224, PLAIN, "leaves no room .* max_model_len=224"),
        ([engine.vocab_size], PLAIN, f"names 0 to {engine.vocab_size - 1}"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"n": 2}, "'n'.* unknown"),
        ([1], {"allowed_token_ids": [engine.vocab_size]}, "allowed_token_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.replica.run(generate, [prompt], params)
    assert len(engine.generate(PLAIN)) == 6


def test_cancelled_requests_leave_nothing_behind(engine: Engine) -> None:
    assert engine.replica.run(cancel_requests, engine.prompts) == 6
    engine.sync(weights_of(engine.model))  # refused while a request is under way
    assert engine.difference(PLAIN) < TOLERANCE


def test_the_order_of_a_sync_on_a_gpu(engine: Engine) -> None:
    handles = [{"GPU-1": (torch.Tensor, (4,), b"handle")}]
    calls = engine.replica.run(sync_on_gpu, handles)
    assert calls[:3] == [("sleep", 2), ("wake_up", ["weights"]), ("start_weight_update", None)]
    assert calls[4:] == [("finish_weight_update", None), ("wake_up", ["kv_cache"]), "reset_prefix_cache"]
    method, kwargs = calls[3]
    bucket = kwargs["update_info"]
    assert method == "update_weights"
    assert pickle.loads(base64.b64decode(bucket.pop("ipc_handles_pickled"))) == handles
    assert bucket == {"names": ["norm"], "dtype_names": ["float32"], "shapes": [[4]]}


def test_an_engine_that_dies_says_of_what(engine: Engine) -> None:
    # The last test on this engine: it does not survive.
    engine.replica.run(break_engine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="engine died: MemoryError: out of blocks"):
            engine.generate(PLAIN)
    with pytest.raises(RuntimeError, match="engine died: MemoryError: out of blocks"):
        engine.replica.run(check_alive)


@pytest.fixture
def parallel_engine(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine that GPUs use, ``AsyncLLM`` with worker processes, here with two ranks on CPU."""
    engine = Engine(tmp_path_factory.mktemp("parallel"), tiny_tokenizers[1], True, tensor_model_parallel_size=2)
    yield engine
    engine.replica.close()


@pytest.mark.slow
def test_an_engine_with_processes_of_its_own_is_synced_and_says_how_it_died(parallel_engine: Engine) -> None:
    for seed in range(2):
        train_a_little(parallel_engine.model, seed)
        parallel_engine.sync(weights_of(parallel_engine.model))
        for params in (PLAIN, TRUNCATED):
            assert parallel_engine.difference(params) < TOLERANCE
    parallel_engine.replica.run(check_alive)
    parallel_engine.replica.run(kill_engine_processes)
    with pytest.raises(RuntimeError, match=r"engine is dead: .*was killed by SIGKILL"):
        parallel_engine.replica.run(wait_for_death)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"engine is dead: .*was killed by SIGKILL"):
            parallel_engine.generate(PLAIN)


@pytest.mark.slow
def test_a_killed_replica_takes_its_engine_with_it(parallel_engine: Engine) -> None:
    pids = parallel_engine.replica.run(descendants)
    assert len(pids) >= 3, "the engine core and two workers"
    parallel_engine.replica.kill()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]

"""Rollout engines beside the model they were given, and log-probs of that model from first principles.

A test hands over an async function of the replica; it runs where the replica is, and its result or exception comes
back. vLLM runs in a process of its own, as in production; the transformers engine in this one.
"""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from support.tiny_workers import load_plain, write_model
from verl.config import HFModelConfig, RolloutConfig
from verl.single_controller.base import Worker
from verl.workers.rollout.replica import ABORTED, RolloutReplica, TokenOutput, get_replica_class

PADDED_ROWS = 40
START_TIMEOUT_S = 240
CALL_TIMEOUT_S = 120

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
WARM = {"temperature": 1.1, "top_p": 1.0, "top_k": -1}
TRUNCATED = {"temperature": 1.1, "top_p": 0.9, "top_k": 30}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


def save_tiny_model(folder: Path, tokenizer_dir: Path, tied: bool, architecture: str = "qwen3") -> PreTrainedModel:
    """A random model with more embedding rows than its tokenizer has ids, and those rows the likeliest of all."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    sizes = {"tied": tied, "rows": len(tokenizer) + PADDED_ROWS, "head_dim": 32}  # vLLM has no smaller heads
    model = load_plain(write_model(folder / "plain", tokenizer_dir, family=architecture, seed=1, **sizes))
    model.config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class LocalReplica:
    """A replica in this process."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self.replica = get_replica_class(config.name)(config, model_config, 0, "cpu")
        self._loop.run_until_complete(self.replica.launch())

    def run(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """``await function(replica, *arguments)``."""
        return self._loop.run_until_complete(function(self.replica, *arguments))

    def close(self) -> None:
        """Shut the replica down."""
        self._loop.run_until_complete(self.replica.shutdown())
        self._loop.close()


class ReplicaProcess:
    """A replica in a process of its own. Starts in the background; the first ``run`` waits for it."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._launched = self._process.submit(_launch, config, model_config)

    def run(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """``await function(replica, *arguments)`` over there."""
        self._launched.result(START_TIMEOUT_S)
        return self._process.submit(_run, function, *arguments).result(CALL_TIMEOUT_S)

    def close(self) -> None:
        """Shut the replica down and end the process; one that was killed has nothing left to do."""
        with suppress(BrokenProcessPool):
            self._process.submit(_close).result(CALL_TIMEOUT_S)
        self._process.shutdown()


def _launch(*arguments: Any) -> None:
    global _replica
    _replica = LocalReplica(*arguments)


def _run(*arguments: Any) -> Any:
    return _replica.run(*arguments)


def _close() -> None:
    _replica.close()


class Engine:
    """A started replica beside the model it was given."""

    def __init__(
        self, name: str, folder: Path, tokenizer_dir: Path, tied: bool, architecture: str = "qwen3", **options: Any
    ) -> None:
        self.name = name
        self.folder = folder
        self.model = save_tiny_model(folder / "model", tokenizer_dir, tied, architecture)
        self.vocab_size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
        self.version = 0
        # Longer than one cache block of 128 tokens, so that the prefix cache takes part.
        shared = [3 + i % 50 for i in range(150)]
        self.prompts = [[*shared, *range(10 + row, 20 + 2 * row)] for row in range(6)]
        sizes = {"prompt_length": 200, "response_length": 24, "max_num_seqs": 16, "cpu_kvcache_space_gb": 0.1}
        sizes["max_num_batched_tokens"] = 256  # some prompts are read in two parts
        options = {"extend_vocab_start_token": self.vocab_size - 60} | options
        config = RolloutConfig(name=name, dtype="float32", **sizes, **options)
        replica_type = ReplicaProcess if name == "vllm" else LocalReplica
        self.replica: Any = replica_type(config, HFModelConfig(path=str(folder / "model")))

    def generate(self, params: dict[str, Any], **options: Any) -> list[TokenOutput]:
        """Answers to all prompts at once."""
        return self.replica.run(generate, self.prompts, {**params, **options})

    def train_a_little(self, seed: int) -> None:
        """Stands for an optimizer step: every weight moves."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()

    def sync(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Send the model's weights, or others, to the engine."""
        self.version += 1
        buckets = write_buckets(self.folder / str(self.version), tensors or dict(self.model.named_parameters()))
        self.replica.run(sync, buckets, self.version)

    def broadcast(self, processes: int = 1) -> None:
        """Send them by a channel to each of the engine's processes, as rank 0 does."""
        sender, tensors = Worker(), {name: weight.detach() for name, weight in self.model.named_parameters()}
        rendezvous, names = sender.open_channel(1 + processes, 60.0), list(tensors)
        buckets = [
            {
                "names": part,
                "shapes": [list(tensors[name].shape) for name in part],
                "dtype_names": ["float32"] * len(part),
            }
            for part in (names[:5], names[5:])
        ]

        def send() -> None:
            sender.join_channel("cpu")
            assert sender.channel is not None
            for tensor in tensors.values():
                sender.channel.broadcast(tensor)

        self.version += 1
        with ThreadPoolExecutor(1) as other:
            sent = other.submit(send)
            self.replica.run(connect, rendezvous)
            self.replica.run(sync, buckets, self.version)
            sent.result()

    def difference(self, params: dict[str, Any], outputs: list[TokenOutput] | None = None) -> float:
        """Largest absolute difference between the log-probs of the engine and of the model."""
        outputs = outputs or self.generate(params)
        return largest_difference(self.model, self.vocab_size, self.prompts, params, outputs)


async def generate(replica: RolloutReplica, prompts: list[list[int]], params: dict[str, Any]) -> list[TokenOutput]:
    """Answers to all prompts at once, each with its own seed from ``seed`` on."""
    seed = params.get("seed", 0)
    calls = [
        replica.generate(prompt, {"max_tokens": 24, "logprobs": True, **params, "seed": seed + row}, f"request-{row}")
        for row, prompt in enumerate(prompts)
    ]
    return await asyncio.gather(*calls)


def check_carried(engine: Engine) -> None:
    """An answer that is cut, and carried on by a second request, is the one that is written in one go."""
    params = {**TRUNCATED, "ignore_eos": True}
    whole = engine.generate(params)
    for delay_s in (0.04, 0.01, 0.002, 0.0):  # however fast this machine is
        cut = engine.replica.run(abort_requests, engine.prompts, params, delay_s)
        if any(output.stop_reason == ABORTED for output in cut):
            break
    assert any(len(output.token_ids) < 24 for output in cut) and {len(output.token_ids) for output in whole} == {24}
    for parts in (cut, engine.generate(params, max_tokens=9)):
        rest = engine.replica.run(carry_on, engine.prompts, params, [output.token_ids for output in parts])
        for full, part, behind in zip(whole, parts, rest, strict=True):
            assert part.token_ids + behind.token_ids == full.token_ids
            log_probs = zip((part.log_probs or []) + (behind.log_probs or []), full.log_probs or [], strict=True)
            assert max(abs(carried - written) for carried, written in log_probs) < 1e-5


async def abort_requests(
    replica: RolloutReplica, prompts: list[list[int]], params: dict[str, Any], delay_s: float
) -> list[TokenOutput]:
    """Answers to all prompts, ended after a while; ids are those that `generate` gives."""
    writing = asyncio.create_task(generate(replica, prompts, params))
    await asyncio.sleep(delay_s)
    await replica.abort(["of another caller", *(f"request-{row}" for row in range(len(prompts)))])
    return await writing


async def carry_on(
    replica: RolloutReplica, prompts: list[list[int]], params: dict[str, Any], written: list[list[int]]
) -> list[TokenOutput]:
    """What follows the tokens that are written."""

    async def one(row: int, ids: list[int]) -> TokenOutput:
        if len(ids) == 24:
            return TokenOutput([], [], "length", 0)
        options = {**params, "max_tokens": 24 - len(ids), "logprobs": True, "seed": row, "place": len(ids)}
        return await replica.generate(prompts[row] + ids, options, f"again-{row}")

    return await asyncio.gather(*(one(row, ids) for row, ids in enumerate(written)))


async def connect(replica: RolloutReplica, rendezvous: Mapping[str, Any]) -> None:
    """Join a channel as the only engine."""
    await replica.connect(rendezvous, 1)


async def sync(replica: RolloutReplica, buckets: list[dict[str, Any]], version: int) -> None:
    """A weight sync; a bucket's file is gone once it is loaded."""
    await replica.start_weight_update()
    for bucket in buckets:
        await replica.update_weights(bucket)
        if "path" in bucket:
            Path(bucket["path"]).unlink()
    await replica.finish_weight_update(version)


def write_buckets(
    folder: Path, tensors: Mapping[str, torch.Tensor], tensors_per_bucket: int = 10
) -> list[dict[str, Any]]:
    """Weight buckets as the training workers export them on CPU; returns one ``update_info`` per bucket."""
    names = list(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for first in range(0, len(names), tensors_per_bucket):
        chosen = names[first : first + tensors_per_bucket]
        path = folder / f"bucket-{first}.safetensors"
        save_file({name: tensors[name].detach().contiguous().clone() for name in chosen}, path)
        infos.append({"path": str(path), "names": chosen, "shapes": [list(tensors[name].shape) for name in chosen]})
    return infos


@torch.no_grad()
def reference_log_probs(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], vocab_size: int, sampling: Mapping[str, Any]
) -> list[float]:
    """Log-prob of each token of ``answer`` under the sampler's distribution, one full forward pass without a cache."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, :vocab_size].double()
    logits = logits / (sampling["temperature"] or 1.0)
    for row in logits:
        order = row.argsort(descending=True)
        kept = order[: sampling["top_k"]] if sampling["top_k"] != -1 else order
        probs = row[kept].softmax(-1)
        nucleus = 1 + int((probs.cumsum(-1) < sampling["top_p"]).sum())
        forbidden = torch.ones(len(row), dtype=torch.bool)
        forbidden[kept[:nucleus]] = False
        row[forbidden] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def largest_difference(
    model: torch.nn.Module,
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    sampling: Mapping[str, Any],
    outputs: Sequence[TokenOutput],
) -> float:
    """Largest absolute difference between the engine's log-probs in ``outputs`` and the model's."""
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_log_probs(model, prompt, output.token_ids, vocab_size, sampling)
        assert output.log_probs is not None and len(expected) == len(output.log_probs) > 0
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, output.log_probs, strict=True)))
    return worst

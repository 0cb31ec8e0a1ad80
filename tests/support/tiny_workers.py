"""Tiny models, hand-made rollouts and groups of ranks for tests of the training workers.

A batch is drawn as a list of rows, each a prompt and a response of token ids; `rollouts` pads them as the agent loops
do. `run_ranks` runs a function on several ranks, processes that all tests share, meeting over gloo.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from verl.config import (
    ActorRolloutRefConfig,
    FSDPActorConfig,
    HFModelConfig,
    OptimizerConfig,
    RefConfig,
    RefModelConfig,
    RolloutConfig,
)
from verl.protocol import DataProto
from verl.weight_sync import named_weights

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
PROMPT, RESPONSE = 6, 8
ADAM_BETA1 = 0.8  # not AdamW's own

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of a response."""


def write_model(
    folder: Path,
    tokenizer: Path,
    *,
    family: str = "qwen3",
    tied: bool = True,
    rows: int = 0,
    seed: int = 0,
    head_dim: int = 16,
    key_heads: int = 2,
) -> Path:
    """Save a random model of two blocks with that tokenizer; ``rows`` of embedding, by default 5 past its ids."""
    ids = AutoTokenizer.from_pretrained(tokenizer)
    heads = {"num_attention_heads": 64 // head_dim} if family == "qwen2" else {"head_dim": head_dim}
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads} | heads
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512} | heads
    torch.manual_seed(seed)
    sizes |= EXPERTS if family.endswith("moe") else {}
    config = AutoConfig.for_model(family, vocab_size=rows or len(ids) + 5, tie_word_embeddings=tied, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)  # sharper distributions than the initial ones, nearly uniform
    model.save_pretrained(folder)
    ids.save_pretrained(folder)
    return folder


def load_plain(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def worker_config(
    student: Path, teacher: Path | None = None, extend_start: int | None = None, rows_per_step: int = 8, **sections: Any
) -> ActorRolloutRefConfig:
    """Settings of the workers, with changes of the sections ``actor``, ``model``, ``ref`` and ``rollout``.

    Gradients are not clipped, and Adam's first moment holds a fifth of the gradient.
    """
    optim = OptimizerConfig(lr=1e-3, weight_decay=0.0, betas=(ADAM_BETA1, 0.999))
    actor = {"ppo_mini_batch_size": rows_per_step, "grad_clip": 1e9, "optim": optim, **sections.get("actor", {})}
    sizes = {"prompt_length": PROMPT, "response_length": RESPONSE, "extend_vocab_start_token": extend_start}
    return ActorRolloutRefConfig(
        model=HFModelConfig(path=str(student), **sections.get("model", {})),
        actor=FSDPActorConfig(**actor),
        ref=RefConfig(model=RefModelConfig(path=None if teacher is None else str(teacher)), **sections.get("ref", {})),
        rollout=RolloutConfig(**sizes, **sections.get("rollout", {})),
    )


def rollouts(rows: Sequence[Row], extend_start: int | None = None, temperature: float = 1.0) -> DataProto:
    """A padded batch of these rows; everything up to and including the first extended token is trained."""
    shape = (len(rows), PROMPT + RESPONSE)
    input_ids, attention = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for number, (prompt, response) in enumerate(rows):
        start, end = PROMPT - len(prompt), PROMPT + len(response)
        input_ids[number, start:end] = torch.tensor(prompt + response)
        attention[number, start:end] = 1
    real = attention[:, PROMPT:]
    special = torch.zeros_like(real)
    if extend_start is not None:
        special = (input_ids[:, PROMPT:] >= extend_start).long() * real
    before = special.cumsum(dim=1) - special
    return DataProto.from_dict(
        {
            "prompts": input_ids[:, :PROMPT],
            "responses": input_ids[:, PROMPT:],
            "input_ids": input_ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0),
            "response_mask": real * (before == 0).long(),
            "distill_special_token_mask": special,
        },
        meta_info={"temperature": temperature},
    )


def answered(talks: list[Any], template: Any) -> DataProto:
    """Conversations as a padded batch, with answers of one to three tokens."""
    prompts = [template.encode_prompt(talk, False) for talk in talks]
    width, answers = max(map(len, prompts)), [[5 + row % 50, 6, 7][: 1 + row % 3] for row in range(len(talks))]
    ids, mask = torch.zeros(2, len(talks), width + 4, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, width - len(prompt) : width + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, width - len(prompt) : width + len(answer)] = 1
    tensors = {"input_ids": ids, "attention_mask": mask, "responses": ids[:, width:], "response_mask": mask[:, width:]}
    raw = np.fromiter(talks, dtype=object, count=len(talks))
    return DataProto.from_dict(tensors, {"raw_prompt": raw}, {"temperature": 1.0})


def draw_rows(count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of all lengths, the longest and an empty response among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [(draw(1 + row % PROMPT), draw((RESPONSE - 3 * row) % (RESPONSE + 1))) for row in range(count)]


def with_loss_inputs(batch: DataProto, seed: int = 0) -> DataProto:
    """Add drawn old log-probs and advantages, for tests that need some and care little which."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.tensor("responses").shape
    drawn = {
        "old_log_probs": -5.0 + 0.3 * torch.randn(shape, generator=generator),
        "advantages": torch.randn(shape, generator=generator),
    }
    return batch.union(DataProto.from_dict(drawn))


def plain_log_probs(
    model: PreTrainedModel, batch: DataProto, vocabulary: int, temperature: float = 1.0
) -> torch.Tensor:
    """(B, R, vocabulary) log-probs at the response positions from whole logits of the padded batch."""
    logits = model(
        input_ids=batch.tensor("input_ids"),
        attention_mask=batch.tensor("attention_mask"),
        position_ids=batch.tensor("position_ids"),
    ).logits[:, -1 - batch.tensor("responses").shape[1] : -1, :vocabulary]
    return (logits / temperature).log_softmax(dim=-1)


def of_tokens(log_probs: torch.Tensor, batch: DataProto) -> torch.Tensor:
    """(B, R) log-probs of the response tokens themselves, 0 at padding."""
    ids = batch.tensor("responses").clamp(max=log_probs.shape[-1] - 1)
    return log_probs.gather(-1, ids[..., None]).squeeze(-1) * batch.tensor("attention_mask")[:, PROMPT:]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a plain one."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    """Whole weights of a student by name."""
    return {name: whole(weight.detach()) for name, weight in named_weights(worker._state.module).items()}


def state_of(worker: Any) -> dict[str, torch.Tensor]:
    """Whole weights of a student, Adam's moments and its count of steps."""
    optimizer = worker._state.optimizer.state
    return {
        f"{name} {what}": whole(value)
        for name, weight in named_weights(worker._state.module).items()
        for what, value in {"weight": weight.detach(), **optimizer[weight]}.items()
    }


def save_checkpoint(worker: Any, folder: Path, step: int = 1) -> None:
    """Write a checkpoint of a student and wait for it; raises OSError where it could not be written."""
    worker.begin_checkpoint(str(folder), step)
    if error := worker.checkpoint_outcome(wait=True).error:
        raise OSError(error)


def exported(worker: Any, paths: list[str] | None = None) -> dict[str, torch.Tensor]:
    """What the engines get, of this rank's buckets; ``paths`` takes where these lay."""
    weights, paths = dict[str, torch.Tensor](), [] if paths is None else paths
    for index in range(len(worker.weight_buckets())):
        if (bucket := worker.export_weight_bucket(index)) is not None:
            paths.append(bucket["path"])
            weights |= load_file(bucket["path"])
    worker.release_weight_buckets()
    return weights


def first_gradient(worker: Any) -> dict[str, torch.Tensor]:
    """The gradient of a student's first optimizer step, read off Adam's first moment: m = (1 - beta1) g."""
    state = worker._state
    return {
        name: whole(state.optimizer.state[parameter]["exp_avg"]) / (1 - ADAM_BETA1)
        for name, parameter in named_weights(state.module).items()
    }


def plain_gradient(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a loss in a plain model's parameters."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradient(got: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    """Equal names and values; and not all zero, which would prove nothing."""
    assert got.keys() == right.keys()
    assert max(float(value.abs().max()) for value in right.values()) > 100 * atol
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def _serve_rank(rank: int, ranks: int, port: int, connection: Connection) -> None:
    """Run what comes, one program after the other, and answer with the error or None."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    while True:
        program, args = connection.recv()
        try:
            program(*args)
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())


def _start_ranks(world_size: int) -> list[Connection]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A server that has imported torch and the workers forks the ranks: importing takes longer than most programs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verl.workers.model_workers"])
    connections = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        context.Process(target=_serve_rank, args=(rank, world_size, port, theirs), daemon=True).start()
        connections.append(ours)
    return connections


_RANKS: dict[int, list[Connection]] = {}


def run_ranks(world_size: int, program: Callable[..., None], *args: Any) -> None:
    """Run ``program(*args)`` on each rank; an error on any of them is raised here. All tests share the processes."""
    connections = _RANKS.get(world_size) or _RANKS.setdefault(world_size, _start_ranks(world_size))
    for connection in connections:
        connection.send((program, args))
    waiting = list(connections)
    while waiting:
        for connection in wait(waiting):
            error = connection.recv()
            if error is not None:
                del _RANKS[world_size]  # the others may wait for a rank that will not come
                raise RuntimeError(error)
            waiting.remove(connection)

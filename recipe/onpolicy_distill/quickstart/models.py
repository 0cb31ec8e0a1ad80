"""A teacher that knows the general tasks, and a student that was the teacher before it learned to recommend.

In: a world's files. Out: two Hugging Face folders (weights in safetensors, fp32; config; generation config;
tokenizer), each found again by everything it was made from.

- The teacher is a Qwen3 trained from nothing on ``general_train``, on the answers. It has more embedding rows than its
  tokenizer has ids, as Qwen3 has, and the student's first item ids fall among the spare ones.
- The student is the teacher with rows for the item tokens, trained on ``rec_train`` alone (or on both for a while, and
  then alone): on every token of the chats, since histories tell what follows what far more often than answers do. It
  learns to recommend, and forgets.

Plain PyTorch on the CPU, where models of this size train fastest. Distillation and evaluation are not dealt with here.

B sequences, T tokens, H hidden size, V rows of the embedding.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.tokenizers import MAX_TOKENS
from recipe.onpolicy_distill.quickstart.world import World
from recipe.onpolicy_distill.tiny_models import new_model, round_up
from verl.utils.dataset.prompt_rows import parse_messages, split_answer
from verl.utils.tokenizer import hf_tokenizer, save_tokenizer

MIN_TEACHER_PADDING = 8
"""Rows that the teacher has beyond its tokenizer, at least."""
ROW_MULTIPLE = 16
"""Embedding rows are rounded up to a multiple of this."""
WARM_UP_STEPS = 20
FINAL_LEARNING_RATE_SHARE = 0.1
SAVE_S = 120.0
CODE = file_digest(__file__, Path(__file__).parents[1] / "tiny_models.py")
IGNORED = -100


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast a model learns."""

    seed: int = 0
    """Seed of first weights and of the order of chats."""
    steps: int = 450
    """Optimizer steps."""
    batch_size: int = 64
    """Chats per step."""
    learning_rate: float = 3e-3
    """The highest; reached after the warm-up, then a cosine down to a tenth."""
    bf16: bool = False
    """Multiply in bf16; weights stay fp32."""
    max_threads: int = 4
    """More than these only wait for each other on models of the quickstart's size."""


@dataclass(frozen=True)
class TeacherConfig(TrainingConfig):
    """Shape and training of the teacher."""

    hidden: int = 96
    """Hidden size H."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of HEAD_DIM each, an even number; two of them share keys and values."""
    tied: bool = True
    """Share the embedding with the lm head, as Qwen3 up to 4B does."""


@dataclass(frozen=True)
class StudentConfig(TrainingConfig):
    """Training of the student; its shape is the teacher's."""

    steps: int = 450
    """Optimizer steps on recommendation alone."""
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    mixed_steps: int = 0
    """Optimizer steps on recommendation and general tasks together, before those."""


class TokenizedChat(NamedTuple):
    """The ids of a chat up to its answer's end token, and where the answer begins."""

    ids: list[int]
    answer_start: int


def make_teacher(world: World, folder: Path, config: TeacherConfig) -> Path:
    """Train the teacher into a folder of its own below ``folder``, or find it there."""

    def make(target: Path) -> None:
        tokenizer = hf_tokenizer(world.teacher_tokenizer)
        model = _new_model(config, tokenizer)
        train(model, tokenized_chats(world.general_train, tokenizer), config, "teacher", on_questions=False)
        save_model(target, model, tokenizer)

    key = {"world": world.folder.name, "code": CODE, **dataclasses.asdict(config)}
    return cached_folder(folder, "teacher", key, make)


def make_student(world: World, teacher: Path, folder: Path, config: StudentConfig) -> Path:
    """Train the student of the teacher in folder ``teacher`` into a folder of its own, or find it there."""

    def make(target: Path) -> None:
        tokenizer = hf_tokenizer(world.student_tokenizer)
        rows = round_up(len(tokenizer), ROW_MULTIPLE)
        model = extended(teacher, world.extend_vocab_start_token, rows, config.seed)
        chats = tokenized_chats(world.rec_train, tokenizer)
        if config.mixed_steps:
            both = chats + tokenized_chats(world.general_train, tokenizer)
            mixed = dataclasses.replace(config, steps=config.mixed_steps)
            train(model, both, mixed, "student on both", on_questions=True)
        train(model, chats, config, "student", on_questions=True)
        save_model(target, model, tokenizer)

    key = {
        "world": world.folder.name,
        "teacher": file_digest(teacher / "config.json", teacher / "model.safetensors"),
        "code": CODE,
        **dataclasses.asdict(config),
    }
    return cached_folder(folder, "student", key, make)


def _new_model(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return new_model(
            tokenizer,
            rows=round_up(len(tokenizer) + MIN_TEACHER_PADDING, ROW_MULTIPLE),
            hidden=config.hidden,
            layers=config.layers,
            heads=config.heads,
            tied=config.tied,
            max_position_embeddings=MAX_TOKENS,
            initializer_range=0.05,
        )


@torch.no_grad()
def extended(teacher: Path, known: int, rows: int, seed: int) -> PreTrainedModel:
    """The teacher with ``rows`` rows of embedding and head; those from ``known`` on are drawn around the mean row."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    # One weight where they are tied.
    for weight in dict.fromkeys([model.get_input_embeddings().weight, model.get_output_embeddings().weight]):
        shared, noise = weight[:known], torch.randn(weight[known:].shape, generator=generator)
        weight[known:] = shared.mean(0) + 0.5 * shared.std(0) * noise
    return model


def tokenized_chats(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedChat]:
    """The chats of a parquet file in its order."""
    cells = pq.read_table(path, columns=["messages"])["messages"].to_pylist()
    chats = [split_answer(parse_messages(cell)) for cell in cells]
    prompts = tokenizer.apply_chat_template([prompt for prompt, _ in chats], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer([answer + tokenizer.eos_token for _, answer in chats])["input_ids"]
    return [TokenizedChat(prompt + answer, len(prompt)) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]


def train(
    model: PreTrainedModel,
    chats: list[TokenizedChat],
    config: TrainingConfig,
    name: str,
    *,
    on_questions: bool,
    unfinished: Path | None = None,
) -> None:
    """Next-token training where the model is: on every token of the chats with ``on_questions``, else on those of the
    answers.

    Args:
        model: any of transformers' causal ones with a ``model`` and a ``lm_head``.
        unfinished: file that keeps the training's state every SAVE_S seconds; where it is there, training goes on from
            it. None: a training that was killed begins anew.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_share(config.steps))
    batches = _batches(chats, config, on_questions)
    model.train()
    parts, done, saved = {"model": model, "optimizer": optimizer, "schedule": schedule}, 0, time.monotonic()
    if unfinished is not None and unfinished.is_file():
        state = torch.load(unfinished, map_location=model.device, weights_only=True)
        done = state["steps"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
        for _ in range(done):
            next(batches)
    bar = tqdm(total=config.steps, initial=done, desc=f"training the {name}", unit="step")
    with _at_most_threads(config.max_threads), bar as progress:
        for step in range(done, config.steps):
            ids, labels = (tensor.to(model.device) for tensor in next(batches))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
                loss = _loss(model, ids, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
            if unfinished is not None and time.monotonic() - saved >= SAVE_S:
                state = {key: part.state_dict() for key, part in parts.items()} | {"steps": step + 1}
                beside = unfinished.with_suffix(".part")
                torch.save(state, beside)
                beside.replace(unfinished)
                saved = time.monotonic()


def _learning_rate_share(steps: int) -> Callable[[int], float]:
    """The learning rate at a step, as a share of the highest: a line up, then a cosine down."""

    def share(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        floor = FINAL_LEARNING_RATE_SHARE
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (floor + (1 - floor) * cosine)

    return share


def _batches(
    chats: list[TokenizedChat], config: TrainingConfig, on_questions: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end, every chat once before any comes again: ids and labels, both (B, T) int64."""
    random, waiting = Random(config.seed), list[TokenizedChat]()
    while True:
        while len(waiting) < config.batch_size:
            waiting += random.sample(chats, len(chats))
        batch, waiting = waiting[: config.batch_size], waiting[config.batch_size :]
        yield token_ids_and_labels(batch, on_questions)


def token_ids_and_labels(batch: list[TokenizedChat], on_questions: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, both (B, T), padded with 0 and IGNORED; with ``on_questions`` only a chat's first token is not
    a label.
    """
    length = max(len(chat.ids) for chat in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, chat in enumerate(batch):
        end, start = len(chat.ids), 1 if on_questions else chat.answer_start
        ids[row, :end] = torch.tensor(chat.ids)
        labels[row, start:end] = ids[row, start:end]
    return ids, labels


def _loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labels that are not IGNORED; ids and labels (B, T).

    Padding stands on the right, where no earlier token attends to it, so no attention mask is needed.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[trained]), targets[trained])


@contextmanager
def _at_most_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(number, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model and tokenizer."""
    disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)

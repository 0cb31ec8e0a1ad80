"""The worlds that are forgotten and recovered in, ready to distil.

In: a world's name and a student's seed. Out: files, teacher, student, and the prompts to rehearse, made once below a
folder and found there again. Everything of a world comes from the one seed, the models included.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.retention.variants import CODES, HISTORIES, ITEMS
from recipe.onpolicy_distill.quickstart import models, world
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.catalogue import ITEM_BEGIN, ITEM_END, code_token
from recipe.onpolicy_distill.quickstart.distillation import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from recipe.onpolicy_distill.quickstart.world import World

SYNTHETIC_PROMPTS = 4096
"""Rows of a file of made-up prompts."""


@dataclass(frozen=True)
class Prepared:
    """A world with its models."""

    world: World
    teacher: Path
    student: Path
    rehearsal: dict[str, Path]
    """Parquet with prompts of the recommender, by `variants.HISTORIES`, ``ITEMS`` and ``CODES``."""
    max_prompt_tokens: int
    max_answer_tokens: int


def prepare(name: str, student_seed: int, folder: Path) -> Prepared:
    """Make a world and its models, or find them.

    Raises:
        ValueError: there is no such world, or what it is made from is not here.
    """
    if name not in WORLDS:
        raise ValueError(f"--world {name} is not one of {', '.join(WORLDS)}")
    return WORLDS[name](student_seed, folder)


def _quickstart(seed: int, folder: Path) -> Prepared:
    """Letters and sums; a catalogue of 128 items; the student learned items alone."""
    config = world.WorldConfig(seed=seed)
    built = world.build(folder, config)
    teacher = models.make_teacher(built, folder, models.TeacherConfig(seed=seed))
    student = models.make_student(built, teacher, folder, models.StudentConfig(seed=seed))
    rehearsal = {HISTORIES: built.rec_train, **synthetic_prompts(built, config, folder)}
    return Prepared(built, teacher, student, rehearsal, MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS)


WORLDS: dict[str, Callable[[int, Path], Prepared]] = {"quickstart": _quickstart}


def synthetic_prompts(built: World, config: world.WorldConfig, folder: Path) -> dict[str, Path]:
    """Files of prompts like the recommender's, of random items and of random codes; nobody's data is in them.

    Nothing learns from their answers, which are therefore the same random items.
    """
    key = {"world": built.folder.name, "rows": SYNTHETIC_PROMPTS, "code": file_digest(__file__)}

    def make(target: Path) -> None:
        items = pq.read_table(built.catalogue, columns=["text"])["text"].to_pylist()
        random = Random(f"{config.seed} synthetic prompts")
        levels = range(config.codes_per_level)

        def random_codes() -> str:
            return ITEM_BEGIN + "".join(code_token(level, random.choice(levels)) for level in "abc") + ITEM_END

        for name, draw in ((ITEMS, lambda: random.choice(items)), (CODES, random_codes)):
            chats = [_prompt(draw, random, config) for _ in range(SYNTHETIC_PROMPTS)]
            _write(target / f"{name}.parquet", name, chats)

    prompts = cached_folder(folder, "prompts", key, make)
    return {name: prompts / f"{name}.parquet" for name in (ITEMS, CODES)}


def _prompt(draw: Callable[[], str], random: Random, config: world.WorldConfig) -> tuple[str, str, str]:
    """Source, question and answer."""
    if random.random() < config.caption_share:
        return "rec_caption", f"caption: {draw()}", "abc"
    return "rec_next", "history: " + "".join(draw() for _ in range(config.history)), draw()


def _write(path: Path, name: str, chats: list[tuple[str, str, str]]) -> None:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    columns = {
        "source": [source for source, _, _ in chats],
        "uuid": [f"{name}-{number}" for number in range(len(chats))],
        "messages": [json.dumps([message("user", asked), message("assistant", told)]) for _, asked, told in chats],
        "metadata": ["{}"] * len(chats),
    }
    pq.write_table(pa.table(columns), path)

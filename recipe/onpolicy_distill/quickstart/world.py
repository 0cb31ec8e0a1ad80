"""A small world to forget and recover in: general tasks, a catalogue, users; as files like anyone's.

In: sizes and a seed. Out: a folder, found again by what it was made from, with

    general_train.parquet   chats of general tasks: what the teacher learns, and the prompts to distil on
    general_test.parquet    the same tasks; no prompt of it is in general_train
    rec_train.parquet       next items of users, and captions of items: what the student learns
    rec_test.parquet        next items of further users, whose histories are not in rec_train, and captions
    catalogue.parquet       item, a, b, c, text, caption, popularity (in the training histories)
    tokenizers/             teacher, and student with the item tokens

The chats are OneRec's: columns ``source``, ``uuid``, ``messages`` and ``metadata``, the last two JSON text, the answer
the last message. ``metadata`` holds ``answer`` and, where an item is asked for or about, ``target_item`` (its number in
the catalogue). Captions are looked up, not inferred, so the test asks for items that training had too.
Nothing is trained or scored here.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.onpolicy_distill import tiny_tokenizers
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.catalogue import Catalogue
from recipe.onpolicy_distill.quickstart.general_tasks import TASKS, draw_problem
from recipe.onpolicy_distill.quickstart.tokenizers import build_tokenizers
from verl.utils.tokenizer import hf_tokenizer

QUESTION_WORDS = [*TASKS, "history", "caption"]
SOURCES = (
    Path(tiny_tokenizers.__file__),
    Path(tiny_tokenizers.__file__).with_name("tiny_chat_template.jinja"),
    *(Path(__file__).with_name(name) for name in ("world.py", "general_tasks.py", "catalogue.py", "tokenizers.py")),
)
"""The source text that decides what is in a world."""
FILES = ("general_train", "general_test", "rec_train", "rec_test", "catalogue")


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the world."""

    seed: int = 0
    """Seed of everything in it."""
    general_train: int = 20_000
    """Chats of general tasks to learn and to distil on."""
    general_test: int = 250
    """Chats of general tasks to test on, equally many per task."""
    rec_train: int = 20_000
    """Recommendation chats to learn."""
    caption_share: float = 0.2
    """Share of captions among them."""
    test_users: int = 512
    """Users to test recommendation on."""
    test_captions: int = 128
    """Captions to test."""
    items: int = 128
    """Items in the catalogue, a multiple of ``tastes``."""
    tastes: int = 8
    """Groups of items; a user likes two."""
    codes_per_level: int = 8
    """Codes at each of the three levels of an item's id."""
    history: int = 6
    """Items in a user's history, before the one to predict."""


@dataclass(frozen=True)
class World:
    """Where everything is."""

    folder: Path
    general_train: Path
    general_test: Path
    rec_train: Path
    rec_test: Path
    catalogue: Path
    teacher_tokenizer: Path
    student_tokenizer: Path
    extend_vocab_start_token: int
    """First id of the student's tokenizer that the teacher's lacks."""


class Chat(NamedTuple):
    """One question and its answer."""

    source: str
    question: str
    answer: str
    metadata: dict[str, Any]


def build(folder: Path, config: WorldConfig) -> World:
    """Write the world into a folder of its own below ``folder``, or find it there."""
    key = {**dataclasses.asdict(config), "code": file_digest(*SOURCES)}
    made = cached_folder(folder, "world", key, lambda target: _write(target, config))
    return open_world(made, made / "tokenizers" / "teacher", made / "tokenizers" / "student")


def open_world(folder: Path, teacher_tokenizer: Path, student_tokenizer: Path) -> World:
    """The world whose files are in ``folder``."""
    return World(
        folder=folder,
        **{name: folder / f"{name}.parquet" for name in FILES},
        teacher_tokenizer=teacher_tokenizer,
        student_tokenizer=student_tokenizer,
        extend_vocab_start_token=len(hf_tokenizer(teacher_tokenizer)),
    )


def _write(folder: Path, config: WorldConfig) -> None:
    build_tokenizers(folder / "tokenizers", QUESTION_WORDS, config.codes_per_level)
    random = _random(config, "general test")
    general_test = draw_test_chats(config.general_test, lambda task: _general_chat(task, random))
    general_train = _general_train(config, {chat.question for chat in general_test})
    catalogue = Catalogue(config.items, config.tastes, config.codes_per_level, _random(config, "catalogue"))
    rec_test = _rec_test(config, catalogue)
    rec_train = _rec_train(config, catalogue, {chat.question for chat in rec_test})
    write_chats(folder, general_train=general_train, general_test=general_test, rec_train=rec_train, rec_test=rec_test)
    _write_catalogue(folder / "catalogue.parquet", catalogue, rec_train)


def _random(config: WorldConfig, purpose: str) -> Random:
    return Random(f"{config.seed} {purpose}")


def draw_test_chats(count: int, draw: Callable[[str], Chat]) -> list[Chat]:
    """``count`` different chats, equally many of each general task; ``draw(task)`` makes one."""
    chats: dict[str, Chat] = {}
    for number, task in enumerate(TASKS, 1):
        while len(chats) < number * count // len(TASKS):
            chat = draw(task)
            chats[chat.question] = chat
    return list(chats.values())


def _general_train(config: WorldConfig, test_questions: set[str]) -> list[Chat]:
    random = _random(config, "general train")
    return _draw(config.general_train, lambda: _general_chat(random.choice(TASKS), random), test_questions)


def _general_chat(task: str, random: Random) -> Chat:
    question, answer = draw_problem(task, random)
    return Chat(f"general_{task}", question, answer, {"answer": answer})


def _rec_test(config: WorldConfig, catalogue: Catalogue) -> list[Chat]:
    """Users with different histories, then items with different captions to look up."""
    random = _random(config, "recommendation test")
    users: dict[str, Chat] = {}
    while len(users) < config.test_users:
        chat = _next_chat(config, catalogue, random)
        users[chat.question] = chat
    items = random.sample(range(config.items), config.test_captions)
    return [*users.values(), *(_caption_chat(catalogue, item) for item in items)]


def _rec_train(config: WorldConfig, catalogue: Catalogue, test_questions: set[str]) -> list[Chat]:
    random = _random(config, "recommendation train")
    captions = round(config.rec_train * config.caption_share)
    users = _draw(config.rec_train - captions, lambda: _next_chat(config, catalogue, random), test_questions)
    chats = users + [_caption_chat(catalogue, random.randrange(config.items)) for _ in range(captions)]
    random.shuffle(chats)
    return chats


def _next_chat(config: WorldConfig, catalogue: Catalogue, random: Random) -> Chat:
    *history, target = catalogue.draw_history(config.history + 1, random)
    answer = catalogue.items[target].text
    metadata = {"answer": answer, "target_item": target, "history": history}
    return Chat("rec_next", "history: " + "".join(catalogue.items[item].text for item in history), answer, metadata)


def _caption_chat(catalogue: Catalogue, number: int) -> Chat:
    item = catalogue.items[number]
    return Chat("rec_caption", f"caption: {item.text}", item.caption, {"answer": item.caption, "target_item": number})


def _draw(count: int, draw: Callable[[], Chat], test_questions: set[str]) -> list[Chat]:
    """``count`` chats, none of which asks what the test asks."""
    chats: list[Chat] = []
    for _ in range(100 * count):
        if len(chats) == count:
            break
        chat = draw()
        if chat.question not in test_questions:
            chats.append(chat)
    if len(chats) == count:
        return chats
    raise ValueError(f"after {100 * count} draws only {len(chats)} of {count} questions are not in the test; test less")


def write_chats(folder: Path, **files: list[Chat]) -> None:
    """Write ``folder/<name>.parquet`` for each name: one row per chat, in OneRec's columns."""
    for name, chats in files.items():
        columns: dict[str, list[str]] = {
            "source": [chat.source for chat in chats],
            "uuid": [f"{name}-{number}" for number in range(len(chats))],
            "messages": [json.dumps([_message("user", c.question), _message("assistant", c.answer)]) for c in chats],
            "metadata": [json.dumps(chat.metadata) for chat in chats],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _write_catalogue(path: Path, catalogue: Catalogue, rec_train: list[Chat]) -> None:
    popularity: Counter[int] = Counter()
    for chat in rec_train:
        if chat.source == "rec_next":
            popularity.update([*chat.metadata["history"], chat.metadata["target_item"]])
    items = catalogue.items
    columns: dict[str, list[Any]] = {
        "item": list(range(len(items))),
        "sid": [list(item.codes) for item in items],
        **{level: [item.codes[place] for item in items] for place, level in enumerate("abc")},
        "text": [item.text for item in items],
        "caption": [item.caption for item in items],
        "popularity": [popularity[number] for number in range(len(items))],
    }
    pq.write_table(pa.table(columns), path)

"""General prompts, and real purchases as chats, which training, distillation and judging read.

In: the teacher, which writes the general prompts; ``../shared/data`` (UCI Online Retail: purchases with their times,
items with semantic ids and titles), or without it a catalogue of the quickstart's kind. Out: two folders with

    general_train.parquet, general_test.parquet   prompts to distil on, and to measure the distance on

    rec_train.parquet   next items of users, titles of items, items of titles: what the student learns and rehearses
    rec_test.parquet    the next item of users who are in no training row; titles and items that training has too
    catalogue.parquet   item, sid, text, caption (its title), popularity in the training histories

in OneRec's layout. Questions and answers are English; the chat template adds its own system prompt.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from experiments.retention import online_retail
from experiments.retention.online_retail import catalogue_items, item_text, purchase_windows, write_catalogue
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.catalogue import Catalogue
from recipe.onpolicy_distill.quickstart.child import run_child
from recipe.onpolicy_distill.quickstart.general_tasks import TASKS, draw_problem
from recipe.onpolicy_distill.quickstart.world import Chat, write_chats

WRITER = "recipe.onpolicy_distill.prompts_from_teacher"
GENERAL = "general_chat"
NEXT, TITLE, ITEM = "rec_next", "rec_title", "rec_item"
QUESTIONS = {
    NEXT: "A customer bought {}. What will this customer buy next?",
    TITLE: "What is the name of the product {}?",
    ITEM: "Which product has the name {}?",
}
"""By source; the placeholder is a history, an item or a title."""
CODES_PER_LEVEL = 64
CODE = file_digest(__file__, str(online_retail.__file__))
"""Of this start: the files may change while the study runs."""
TEST_USERS = 1 / 8


@dataclass(frozen=True)
class PromptsConfig:
    """How many general prompts, and where from."""

    seed: int = 0
    bf16: bool = False
    """Written in bf16."""
    train: int = 1500
    test: int = 64
    """The first ones; none of them is trained on."""
    from_teacher: bool = True
    """Written by the teacher; False: the quickstart's tasks, which need no model."""


@dataclass(frozen=True)
class DataConfig:
    """Sizes of the data."""

    seed: int = 0
    items: int = 128
    """Items in the catalogue: the most purchased ones."""
    history: int = 12
    """Purchases before the one to predict."""
    rec_train: int = 20_000
    about_share: float = 0.5
    """Share of questions about titles and items among the training rows, half of each."""
    test_users: int = 400
    """At most."""
    test_about: int = 64
    """Items that are asked for by title, and titles that are asked for."""


class Purchases(NamedTuple):
    """Items by number, as rows with ``sid`` and ``title``, and runs of purchases of users apart."""

    items: dict[int, dict[str, Any]]
    trained: list[list[int]]
    tested: list[list[int]]
    """One run of each held-out user."""


def make_prompts(teacher: Path, folder: Path, config: PromptsConfig) -> Path:
    """The folder of general prompts, made or found below ``folder``; raises RuntimeError where the teacher fails."""

    def make(target: Path) -> None:
        random, count = Random(config.seed), config.train + config.test
        tasks = (draw_problem(random.choice(TASKS), random)[0] for _ in range(count))
        texts = _written_by(teacher, target / "written.parquet", count, config) if config.from_teacher else tasks
        chats = [Chat(GENERAL, text, "-", {}) for text in texts]
        write_chats(target, general_test=chats[: config.test], general_train=chats[config.test :])

    return cached_folder(folder, "prompts", {"teacher": teacher.name} | asdict(config), make)


def _written_by(teacher: Path, path: Path, count: int, config: PromptsConfig) -> list[str]:
    settings = {"model": teacher, "count": count, "out": path, "seed": config.seed, "source": GENERAL}
    settings |= {"max-new-tokens": 128, "max-prompt-length": 256, "languages": "latin"}
    settings["rollout"] = json.dumps({"dtype": "bfloat16" if config.bf16 else "float32"})
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    if code := run_child([sys.executable, "-m", WRITER, *arguments]):
        raise RuntimeError(f"{WRITER} ended with code {code}; its own error is above")
    cells = pq.read_table(path, columns=["messages"])["messages"].to_pylist()
    return [json.loads(cell)[0]["content"] for cell in cells]


def make_data(folder: Path, config: DataConfig, shared: Path) -> Path:
    """The folder of purchases, made or found below ``folder``."""
    purchases = online_retail.files(shared)
    real = all(path.is_file() for path in purchases)
    key = {"code": CODE, "purchases": file_digest(*purchases) if real else None, **asdict(config)}

    def make(target: Path) -> None:
        random = Random(f"{config.seed} real model")
        _write(target, config, (_online_retail if real else _made_up)(config, shared, random), random)

    return cached_folder(folder, "data", key, make)


def _online_retail(config: DataConfig, shared: Path, random: Random) -> Purchases:
    items = catalogue_items(shared, config.items)
    windows = purchase_windows(shared, items, config.history + 1)
    users = sorted(user for user, runs in windows.items() if runs)
    random.shuffle(users)
    held_out = round(len(users) * TEST_USERS)
    return Purchases(
        {pid: row | {"title": row["title"].strip().lower()} for pid, row in items.items()},
        [run for user in users[held_out:] for run in windows[user]],
        [windows[user][-1] for user in users[:held_out]],
    )


def _made_up(config: DataConfig, shared: Path, random: Random) -> Purchases:
    made = Catalogue(config.items, 8, CODES_PER_LEVEL, random)
    items = {number: {"sid": list(item.codes), "title": item.caption} for number, item in enumerate(made.items)}
    runs = [made.draw_history(config.history + 1, random) for _ in range(config.rec_train + config.test_users)]
    return Purchases(items, runs[config.test_users :], runs[: config.test_users])


def _write(folder: Path, config: DataConfig, purchases: Purchases, random: Random) -> None:
    items = purchases.items
    about = round(config.rec_train * config.about_share / 2)
    titles = Counter(item["title"] for item in items.values())
    named = [number for number, item in items.items() if titles[item["title"]] == 1]  # a title of two has no answer
    train = [_next_chat(run, items) for run in random.choices(purchases.trained, k=config.rec_train - 2 * about)]
    train += [_about(source, number, items) for source in (TITLE, ITEM) for number in random.choices(named, k=about)]
    random.shuffle(train)
    test = [_next_chat(run, items) for run in purchases.tested[: config.test_users]]
    asked = random.sample(named, min(config.test_about, len(named)))
    test += [_about(source, number, items) for source in (TITLE, ITEM) for number in asked]
    write_chats(folder, rec_train=train, rec_test=test)
    popularity = Counter(number for run in purchases.trained for number in run)
    write_catalogue(folder / "catalogue.parquet", items, popularity)


def _next_chat(run: list[int], items: dict[int, dict[str, Any]]) -> Chat:
    *history, target = (item_text(items[number]) for number in run)
    return Chat(NEXT, QUESTIONS[NEXT].format("".join(history)), target, {"answer": target, "target_item": run[-1]})


def _about(source: str, number: int, items: dict[int, dict[str, Any]]) -> Chat:
    text, title = item_text(items[number]), items[number]["title"]
    asked, answer = (text, title) if source == TITLE else (title, text)
    return Chat(source, QUESTIONS[source].format(asked), answer, {"answer": answer, "target_item": number})

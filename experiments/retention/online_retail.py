"""Real purchases in a world of the quickstart's form: UCI Online Retail beside general tasks, over real tokenizers.

In: ``../shared/data`` (purchases with their times, items with semantic ids and titles, the ``mini8k`` tokenizers).
Out: the files of a `World`. The catalogue is that of the most purchased items; a user's purchases of these, in order,
make histories and the item after them. Users who are tested on are in no training row. Captions are titles, as far as
they fit an answer. General tasks are the quickstart's, letters apart, so that each is a token.
"""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.general_tasks import TASKS, draw_problem
from recipe.onpolicy_distill.quickstart.world import Chat, World, draw_test_chats, open_world, write_chats
from verl.utils.dataset.items import ITEM_BEGIN, ITEM_END, code_token
from verl.utils.tokenizer import hf_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SOURCE = "rec_online_retail"


@dataclass(frozen=True)
class OnlineRetailConfig:
    """Sizes of the world."""

    seed: int = 0
    """Of general tasks, of the split of users and of what is drawn from them."""
    items: int = 256
    """Items in the catalogue: the most purchased ones."""
    history: int = 6
    """Items before the one to predict."""
    general_train: int = 20_000
    general_test: int = 250
    rec_train: int = 40_000
    """Rows with a next item, and captions."""
    caption_share: float = 0.2
    test_prompts: int = 512
    """Histories of users who are in no training row, one of each; at most."""
    test_captions: int = 64
    test_users: float = 1 / 8
    """Share of users who are tested on."""
    title_tokens: int = 14
    """Longer titles are no captions."""


def build(folder: Path, config: OnlineRetailConfig, data: Path = DATA) -> World:
    """Write the world below ``folder``, or find it there.

    Raises:
        ValueError: the data are not here.
    """
    tokenizers = [data / "tokenizer" / name for name in ("mini8k", "mini8k-item256")]
    read = [*files(data), *(folder / "tokenizer.json" for folder in tokenizers)]
    for path in read:
        if not path.is_file():
            raise ValueError(f"--world online_retail needs {path}, which the project does not ship")
    key = {"code": file_digest(__file__), "read": file_digest(*read), **asdict(config)}
    return open_world(cached_folder(folder, "online-retail", key, lambda made: _write(made, config, data)), *tokenizers)


def files(data: Path) -> list[Path]:
    """Purchases and items."""
    return [data / "rec" / "online_retail" / f"{name}.parquet" for name in ("interactions", "items")]


def _write(folder: Path, config: OnlineRetailConfig, data: Path) -> None:
    random = Random(f"{config.seed} online retail")
    test = draw_test_chats(config.general_test, lambda task: _general_chat(task, random))
    asked = {chat.question for chat in test}
    train: list[Chat] = []
    while len(train) < config.general_train:
        chat = _general_chat(random.choice(TASKS), random)
        train += [chat] if chat.question not in asked else []

    catalogue = catalogue_items(data, config.items)
    histories = purchase_windows(data, catalogue, config.history + 1)
    users = sorted(histories)
    random.shuffle(users)
    held_out = round(len(users) * config.test_users)
    trained = [window for user in users[held_out:] for window in histories[user]]
    # One of each user: windows of the same one share all items but one, and a wholesaler has dozens.
    tested = [histories[user][-1] for user in users[:held_out] if histories[user]][: config.test_prompts]
    captions = _captions(data, catalogue, config.title_tokens)
    asked_for = round(config.rec_train * config.caption_share)
    rec_train = [_next_chat(w, catalogue) for w in random.sample(trained, config.rec_train - asked_for)]
    rec_train += random.choices(captions, k=asked_for)
    random.shuffle(rec_train)
    rec_test = [_next_chat(window, catalogue) for window in tested]
    rec_test += random.sample(captions, config.test_captions)
    write_chats(folder, general_train=train, general_test=test, rec_train=rec_train, rec_test=rec_test)
    popularity = Counter(item for window in trained for item in window)
    write_catalogue(folder / "catalogue.parquet", catalogue, popularity)


# ---------------------------------------------------------------------- general tasks


def _general_chat(task: str, random: Random) -> Chat:
    """The quickstart's problem with its letters apart; sums stay as they are."""
    question, answer = draw_problem(task, random)
    if task != "add":
        question, answer = f"{task}: {' '.join(question.removeprefix(f'{task}: '))}", " ".join(answer)
    return Chat(f"general_{task}", question, answer, {"answer": answer})


# ---------------------------------------------------------------------- items


def catalogue_items(data: Path, items: int) -> dict[int, dict[str, Any]]:
    """The most purchased items by number; of those that share an id, the first."""
    rows = pq.read_table(files(data)[1]).to_pylist()
    chosen: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (-row["n_purchases"], row["pid"])):
        chosen.setdefault(tuple(row["sid"]), row)
        if len(chosen) == items:
            break
    return {row["pid"]: row for row in chosen.values()}


def item_text(item: dict[str, Any]) -> str:
    codes = "".join(code_token(level, code) for level, code in enumerate(item["sid"]))
    return ITEM_BEGIN + codes + ITEM_END


def purchase_windows(data: Path, catalogue: dict[int, dict[str, Any]], length: int) -> dict[str, list[list[int]]]:
    """Every run of ``length`` purchases of each user, in order of time."""
    table = pq.read_table(files(data)[0], columns=["uid", "ts", "pid"])
    purchases: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in table.to_pylist():
        if row["pid"] in catalogue:
            purchases[str(row["uid"])].append((row["ts"], row["pid"]))
    histories = {}
    for user, bought in purchases.items():
        order = [pid for _, pid in sorted(bought, key=lambda one: one[0])]  # stable: an invoice keeps its order
        histories[user] = [order[start : start + length] for start in range(len(order) - length + 1)]
    return histories


def _next_chat(window: list[int], catalogue: dict[int, dict[str, Any]]) -> Chat:
    *history, target = (item_text(catalogue[pid]) for pid in window)
    metadata = {"answer": target, "target_item": window[-1], "history": window[:-1]}
    return Chat(f"{SOURCE}_next", "history: " + "".join(history), target, metadata)


def _captions(data: Path, catalogue: dict[int, dict[str, Any]], title_tokens: int) -> list[Chat]:
    tokenizer = hf_tokenizer(data / "tokenizer" / "mini8k")
    titles = {pid: item["title"].strip() for pid, item in catalogue.items()}
    return [
        Chat(f"{SOURCE}_caption", f"caption: {item_text(catalogue[pid])}", title, {"answer": title, "target_item": pid})
        for pid, title in titles.items()
        if len(tokenizer(title)["input_ids"]) <= title_tokens
    ]


def write_catalogue(path: Path, catalogue: dict[int, dict[str, Any]], popularity: Counter[int]) -> None:
    columns: dict[str, list[Any]] = {
        "item": list(catalogue),
        "sid": [list(item["sid"]) for item in catalogue.values()],
        "text": [item_text(item) for item in catalogue.values()],
        "caption": [item["title"].strip() for item in catalogue.values()],
        "popularity": [popularity[pid] for pid in catalogue],
    }
    pq.write_table(pa.table(columns), path)

"""Pairs of tokenizer folders for the vocabulary tests, and ways to break them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TEACHER_IDS = 329
TEACHER_ROWS, STUDENT_ROWS = 340, 384
END, PAD = 322, 320


class Folders(NamedTuple):
    """A student and a teacher without weights: tokenizers and configs."""

    student: Path
    teacher: Path


def copy_pair(teacher: Path, student: Path, out: Path) -> Folders:
    """Copies of two tokenizers that may be broken, with the configs of models that have some padded rows."""
    folders = Folders(shutil.copytree(student, out / "student"), shutil.copytree(teacher, out / "teacher"))
    write_configs(folders, STUDENT_ROWS, TEACHER_ROWS, END)
    return folders


def write_configs(folders: Folders, student_rows: int, teacher_rows: int, end: int | None) -> None:
    for folder, rows in zip(folders, (student_rows, teacher_rows), strict=True):
        write_json(folder / "config.json", {"model_type": "qwen3", "vocab_size": rows, "eos_token_id": end})


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    write_json(path, values)


def swap_tokens(folder: Path, first: str, second: str) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    edit_json(folder / "tokenizer.json", swap)


def add_token(folder: Path, **entries: Any) -> None:
    """One more token, like the last one but for ``entries``."""

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 355, **entries})

    edit_json(folder / "tokenizer.json", change)


def renumber(folder: Path, new_id: Callable[[int], int | None]) -> None:
    """Give added tokens other ids; None takes one out."""

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if new_id(token["id"]) is not None]
        for token in tokenizer["added_tokens"]:
            tokenizer["model"]["vocab"].pop(token["content"], None)
            token["id"] = new_id(token["id"])
            # Ids of added tokens that the model's vocabulary does not hold are numbered afresh on loading.
            tokenizer["model"]["vocab"][token["content"]] = token["id"]

    edit_json(folder / "tokenizer.json", change)


def edit_template(folder: Path, old: str, new: str) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")

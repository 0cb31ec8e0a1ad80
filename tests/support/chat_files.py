"""Parquet files of chats for tests of data sets."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EXTEND_START = 329
"""First item token of the tiny student."""


def chat(question: str, answer: str = "Yes.", **row: Any) -> dict[str, Any]:
    """A row in OneRec's layout."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"source": "letters", "uuid": f"id-{question}", "messages": json.dumps(messages), **row}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a parquet file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of dropped rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

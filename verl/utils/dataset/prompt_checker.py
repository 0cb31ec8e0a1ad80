"""Which rows of the data can be used, how long their prompts are, and a report of the rows that are dropped.

In: rows in order, and the reader and encoder of a data set. Out: one ``RowCheck`` per row, in the same order, also as a
table; and a ``DropReport``. A check depends on the row and ``PromptChecker.settings`` alone, so it can be cached.

Python reads and renders the rows; the tokenizer counts a block of prompts at a time, with its own threads on all cores.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.prompt_rows import BadRowError, Message, PromptRow, lists_tools
from verl.utils.dataset.prompt_tokens import LONGEST_SWITCH_TOKENS, PromptEncoder, append_switch, possible_switches

PROMPTS_PER_BLOCK = 64
"""Prompts tokenized together; each of their tokens takes some 200 bytes until it is counted."""
CHECKS_PER_BATCH = 4096
"""Checks held as Python objects at a time."""
SOURCES_SHOWN = 12
"""Sources in a summary, the most frequent first."""
LABEL = pa.dictionary(pa.int32(), pa.string())
CHECK_SCHEMA = pa.schema(
    {"source": LABEL, "reason": LABEL, "detail": pa.string(), "tokens": pa.int32(), "extended": pa.int32()}
)


class RowCheck(NamedTuple):
    """Whether one row can be used, and the length of its prompt."""

    source: str
    reason: str | None = None
    """Why it cannot be used, as a code to count by; None: it can."""
    detail: str | None = None
    """The same for people."""
    tokens: int | None = None
    """Length of its prompt, with the longest think switch where that may matter; None without a prompt."""
    extended: int | None = None
    """How many of them are extended ids; None also without a threshold."""


def check_table(checks: Iterable[RowCheck]) -> pa.Table:
    """Checks as a table of ``CHECK_SCHEMA``, some 20 bytes a row."""
    remaining, batches = iter(checks), []
    # In batches, so that no more than one of them is in Python's own, much larger objects.
    while batch := list(islice(remaining, CHECKS_PER_BATCH)):
        batches.append(pa.RecordBatch.from_pylist([check._asdict() for check in batch], CHECK_SCHEMA))
    return pa.Table.from_batches(batches, CHECK_SCHEMA)


@dataclass(frozen=True)
class PromptChecker:
    """Checks whether rows can be used under the ``data`` settings."""

    encoder: PromptEncoder
    config: DataConfig
    extend_start: int | None
    """First extended id; None: no extension."""
    extended_sources: Sequence[str]
    """Patterns of the sources whose prompts may hold extended tokens."""
    read_prompt: Callable[[Row], PromptRow]
    """Reads one row; raises BadRowError."""
    source_of: Callable[[Row], str]
    """The source of a row."""

    def settings(self) -> dict[str, Any]:
        """What checks depend on beside the row and the encoder, as JSON can hold it."""
        names = ("prompt_key", "data_source_key", "prompt_extend_tokens")
        return {name: getattr(self.config, name) for name in names} | {
            "extend_start": self.extend_start,
            "extended_sources": list(self.extended_sources),
            "limit": self._limit,
            "switches": possible_switches(self.config),
        }

    @property
    def _limit(self) -> int | None:
        """Most tokens of a prompt; None where prompts are cut instead: checks are then the same under every limit."""
        is_limited = self.config.filter_overlong_prompts or self.config.truncation == "error"
        return self.config.max_prompt_length if is_limited else None

    def check_rows(self, rows: Iterable[Row]) -> Iterator[RowCheck]:
        """One check per row, in order."""
        remaining = iter(rows)
        while block := list(islice(remaining, PROMPTS_PER_BLOCK)):
            prompts = [self._render(row) for row in block]
            ids = iter(self.encoder.tokenize([text for _, text in prompts if isinstance(text, str)]))
            for row, (messages, text) in zip(block, prompts, strict=True):
                if isinstance(text, str):
                    yield self._check(row, messages, next(ids))
                else:
                    yield RowCheck(self.source_of(row), text.reason, text.detail)

    def _render(self, row: Row) -> tuple[list[Message], str | BadRowError]:
        """Messages of a row, and the text of its prompt with the first possible think switch."""
        try:
            messages = self.read_prompt(row).messages
            first = append_switch(messages, possible_switches(self.config)[0])
            return messages, self.encoder.render(first, lists_tools(row))
        except BadRowError as bad:
            return [], bad

    def _check(self, row: Row, messages: list[Message], ids: list[int]) -> RowCheck:
        source, tokens, start, limit = self.source_of(row), len(ids), self.extend_start, self._limit
        extended = sum(token >= start for token in ids) if start is not None else None
        replaced = self.config.prompt_extend_tokens == "replace"
        if extended and not replaced and not any(fnmatchcase(source, p) for p in self.extended_sources):
            detail = f"the prompt holds {extended} ids from {start} on"
            return RowCheck(source, "extended_tokens", detail, tokens, extended)
        # In auto mode every epoch draws a switch anew: a prompt must fit with the longest. Almost every prompt is far
        # from the limit and need not be encoded again with each switch.
        if limit is not None and tokens + LONGEST_SWITCH_TOKENS > limit:
            others = [append_switch(messages, switch) for switch in possible_switches(self.config)[1:]]
            tokens = max(map(len, [ids, *self.encoder.encode(others, lists_tools(row))]))
        if limit is not None and tokens > limit:
            return RowCheck(source, "overlong", f"{tokens} tokens, data.max_prompt_length={limit}", tokens, extended)
        return RowCheck(source, None, None, tokens, extended)


class DropReport:
    """Counts of kept and dropped rows by reason and source, and a JSONL line for each that was dropped.

    Args:
        path: the JSONL file; None: counts alone.
        kept: rows kept, by source.
        dropped: lines of the file, which hold at least ``reason`` and ``source``.
    """

    def __init__(self, path: str | Path | None, kept: Counter[str], dropped: Iterable[dict[str, Any]]) -> None:
        self.path = Path(path) if path is not None else None
        self.kept = kept
        """Rows kept, by source."""
        self.dropped_by_source: Counter[tuple[str, str]] = Counter()
        """Rows dropped, by reason and source."""
        self.dropped: Counter[str] = Counter()
        """Rows dropped, by reason."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate cannot be written as UTF-8, and may be the very reason why the row was dropped.
        with Path(self.path or os.devnull).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for line in dropped:
                self.dropped_by_source[line["reason"], line["source"]] += 1
                self.dropped[line["reason"]] += 1
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.rows = kept.total() + self.dropped.total()
        """Rows kept and dropped."""
        self.dropped_fraction = self.dropped.total() / max(self.rows, 1)
        """Share of the rows that was dropped; 0 without rows."""

    def reasons(self) -> str:
        """Counts by reason in one line, and where each row is recorded."""
        counts = ", ".join(f"{rows:,} {reason}" for reason, rows in self.dropped.most_common())
        where = f"; each dropped row is in {self.path}" if counts and self.path else ""
        return f"{counts or 'none'}{where}"

    def summary(self) -> str:
        """Rows kept and dropped, by reason and source, on one screen."""
        lines = [f"kept {self.kept.total():,} of {self.rows:,} rows, dropped {self.reasons()}"]
        for (reason, source), rows in self.dropped_by_source.most_common(SOURCES_SHOWN):
            lines.append(f"  dropped {rows:,} of source {source}: {reason}")
        lines += [f"  source {source}: {rows:,}" for source, rows in self.kept.most_common(SOURCES_SHOWN)]
        return "\n".join(lines)

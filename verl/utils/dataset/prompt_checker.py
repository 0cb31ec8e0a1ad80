"""Which rows of the data can be used, how long their prompts are, and a report of the rows that are dropped.

In: rows in order, and the reader and encoder of a data set. Out: one ``RowCheck`` per row, in the same order, also as a
table; and a ``DropReport``. A check depends on the row and ``PromptChecker.settings`` alone, so it can be cached.

Python reads and renders the rows; the tokenizer counts a block of prompts at a time, with its own threads on all cores.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.prompt_rows import BadRowError, Message, PromptRow, lists_tools
from verl.utils.dataset.prompt_tokens import PromptEncoder, append_switch, possible_switches

PROMPTS_PER_BLOCK = 64
"""Prompts tokenized together; each of their tokens takes some 200 bytes until it is counted."""
CHECKS_PER_BATCH = 4096
"""Checks held as Python objects at a time."""
SOURCES_SHOWN = 12
"""Sources in a summary, the most frequent first."""
SOURCES_PER_REASON = 4
"""Sources named beside a reason."""
LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Line breaks that JSON does not escape by itself."""


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


CHECK_SCHEMA = pa.schema(
    [
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("detail", pa.string()),
        ("tokens", pa.int32()),
        ("extended", pa.int32()),
    ]
)


def check_table(checks: Iterable[RowCheck]) -> pa.Table:
    """Checks as a table of ``CHECK_SCHEMA``, some 20 bytes a row."""
    remaining, batches = iter(checks), []
    # In batches, so that no more than one of them is in Python's own, much larger objects.
    while batch := list(islice(remaining, CHECKS_PER_BATCH)):
        columns = dict(zip(CHECK_SCHEMA.names, zip(*batch, strict=True), strict=True))
        batches.append(pa.RecordBatch.from_pydict(columns, CHECK_SCHEMA))
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

    def settings(self) -> dict[str, Any] | None:
        """What checks depend on beside the row, as JSON can hold it; None where the encoder has no digest."""
        if (encoder := self.encoder.digest()) is None:
            return None
        return {
            "encoder": encoder,
            "extend_start": self.extend_start,
            "prompt_key": self.config.prompt_key,
            "data_source_key": self.config.data_source_key,
            "replaces_extended": self.config.prompt_extend_tokens == "replace",
            "extended_sources": list(self.extended_sources),
            # None where prompts are cut instead: checks are then the same under every limit.
            "limit": self.config.max_prompt_length if self._is_limited else None,
            "switches": possible_switches(self.config),
        }

    @property
    def _is_limited(self) -> bool:
        return self.config.filter_overlong_prompts or self.config.truncation == "error"

    def check_rows(self, rows: Iterable[Row]) -> Iterator[RowCheck]:
        """One check per row, in order."""
        remaining = iter(rows)
        while block := list(islice(remaining, PROMPTS_PER_BLOCK)):
            chats = [self._read(row) for row in block]
            outcomes: list[list[int] | BadRowError] = [bad or [] for _, bad in chats]
            switch = possible_switches(self.config)[0]
            # Prompts with and without tools are rendered apart: the template takes one list of tools for all of a call.
            for with_tools in (True, False):
                members = {
                    place: append_switch(messages, switch)
                    for place, (row, (messages, bad)) in enumerate(zip(block, chats, strict=True))
                    if bad is None and lists_tools(row) == with_tools
                }
                encoded = self.encoder.encode_each(list(members.values()), with_tools)
                for place, ids in zip(members, encoded, strict=True):
                    outcomes[place] = ids
            for row, (messages, _), outcome in zip(block, chats, outcomes, strict=True):
                yield self.check_row(row, messages, outcome)

    def check_row(self, row: Row, messages: list[Message], ids: list[int] | BadRowError) -> RowCheck:
        """The check of a row whose ``messages``, with the first possible think switch, have these token ids."""
        source = self.source_of(row)
        if isinstance(ids, BadRowError):
            return RowCheck(source, ids.reason, ids.detail)
        tokens, start, limit = len(ids), self.extend_start, self.config.max_prompt_length
        extended = sum(token >= start for token in ids) if start is not None else None
        replaced = self.config.prompt_extend_tokens == "replace"
        if extended and not replaced and not any(fnmatchcase(source, p) for p in self.extended_sources):
            detail = f"the prompt holds {extended} ids from {start} on"
            return RowCheck(source, "extended_tokens", detail, tokens, extended)
        if self._is_limited:
            # In auto mode every epoch draws a switch anew: a prompt must fit with the longest.
            tokens = self.encoder.longest_length(messages, ids, lists_tools(row))
            if tokens > limit:
                detail = f"{tokens} tokens, data.max_prompt_length={limit}"
                return RowCheck(source, "overlong", detail, tokens, extended)
        return RowCheck(source, None, None, tokens, extended)

    def _read(self, row: Row) -> tuple[list[Message], BadRowError | None]:
        try:
            prompt = self.read_prompt(row)
            _ = prompt.tools_kwargs  # read here for its errors
        except BadRowError as bad:
            return [], bad
        return prompt.messages, None


class DropReport:
    """Counts of kept and dropped rows by reason and source, and a JSONL line for each that was dropped."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        """The JSONL file; None: counts alone."""
        self.kept: Counter[str] = Counter()
        """Rows kept, by source."""
        self.dropped_by_source: Counter[tuple[str, str]] = Counter()
        """Rows dropped, by reason and source."""

    def record_rows(self, kept: Mapping[str, int], dropped: Iterable[dict[str, Any]]) -> None:
        """Count kept rows by source, and dropped rows, whose lines hold at least ``reason`` and ``source``."""
        self.kept.update(kept)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate cannot be written as UTF-8, and may be the very reason why the row was dropped.
        with Path(self.path or os.devnull).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for line in dropped:
                self.dropped_by_source[line["reason"], line["source"]] += 1
                file.write(json.dumps(line, ensure_ascii=False).translate(LINE_BREAKS) + "\n")

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped, by reason."""
        reasons: Counter[str] = Counter()
        for (reason, _), rows in self.dropped_by_source.items():
            reasons[reason] += rows
        return reasons

    @property
    def rows(self) -> int:
        """Rows kept and dropped."""
        return self.kept.total() + self.dropped_by_source.total()

    @property
    def dropped_fraction(self) -> float:
        """Share of the rows that was dropped; 0 without rows."""
        return self.dropped_by_source.total() / max(self.rows, 1)

    def reasons(self) -> str:
        """Counts by reason in one line."""
        return ", ".join(f"{rows:,} {reason}" for reason, rows in self.dropped.most_common())

    def summary(self) -> str:
        """Rows kept and dropped, by reason and source, on one screen."""
        lines = [f"kept {self.kept.total():,} of {self.rows:,} rows"]
        for reason, rows in self.dropped.most_common():
            sources = Counter({source: n for (why, source), n in self.dropped_by_source.items() if why == reason})
            lines.append(f"  dropped {rows:,}: {reason} ({_most_common(sources, SOURCES_PER_REASON)})")
        if self.dropped_by_source and self.path is not None:
            lines.append(f"  each dropped row is in {self.path}")
        lines += [f"  source {source}: {rows:,}" for source, rows in self.kept.most_common(SOURCES_SHOWN)]
        if len(self.kept) > SOURCES_SHOWN:
            lines.append(f"  and {len(self.kept) - SOURCES_SHOWN} more sources")
        return "\n".join(lines)


def _most_common(counts: Counter[str], most: int) -> str:
    named = ", ".join(f"{name} {rows:,}" for name, rows in counts.most_common(most))
    return named + (f", {len(counts) - most} more" if len(counts) > most else "")

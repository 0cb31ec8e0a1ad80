"""Prompts for rollouts, from parquet files in verl's layout, and the collation of a batch of them.

In: parquet files with a column of prompts (lists of messages), the student's tokenizer, the ``data`` settings. Out:
one dictionary per prompt:

    raw_prompt    list of {"role", "content"}       uuid          str, the row's own or made from its place
    source        str, for per-source metrics       index         int, row number over all files
    data_source   str, for the reward function      extra_info    dict, for the reward function
    reward_model  {"style", "ground_truth"}         tools_kwargs  dict by tool name
    has_extended   bool, whether the prompt, before any cut, holds extended tokens
    prompt_ids    list[int] of a cut prompt, None of one that fits; only where data.truncation cuts
    agent_name    str or None; only where the files have that column
    hints         dict by column, str, "" where a row has none; only where a teacher reads columns of its own

Rows that cannot be used are dropped, counted and recorded when the data set is built, never later. Rows stay on disk;
their checks are kept in ``data.cache_dir``, so that the next run over the same data starts at once. Order, batches and
resume belong to the data loader.
"""

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset import parquet_files
from verl.utils.dataset.parquet_files import Files, ParquetRows, Row
from verl.utils.dataset.prompt_rows import PromptRow, lists_tools, mapping_of, parse_messages, text_of
from verl.utils.dataset.prompt_tokens import (
    PromptChecker,
    PromptEncoder,
    append_switch,
    check_table,
    think_switch,
    truncate,
)

logger = logging.getLogger(__name__)

SOURCE_COLUMNS = ("source", "data_source")
"""OneRec's and verl's names for the column of the source; each stands in for the other."""
UNKNOWN_SOURCE = "unknown"
SOURCES_SHOWN = 12
"""Sources in a summary, the most frequent first."""
DROP_FIXES = {
    "overlong": "raise data.max_prompt_length",
    "extended_tokens": "name a teacher that reads items: ++algorithm.distill.teachers.self="
    "'{vocabulary: full, sources: [SOURCE]}', or set data.prompt_extend_tokens=replace",
}
"""How rows that are dropped for a reason can be kept."""
TEXT_CHARACTERS = 200
"""How much of a dropped row, and of a reason in a summary, is written down."""


def collate_fn(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turn B items into one batch: tensors are stacked, everything else becomes an object array of length B.

    Raises ValueError where a tensor key is missing from some items; a missing other key becomes None.
    """
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for item in items for key in item):
        values = [item.get(key) for item in items]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if tensors and len(tensors) < len(items):
            raise ValueError(f"the tensor {key!r} is missing from some of the {len(items)} items of a batch")
        # np.array would turn lists of equal length into a second dimension.
        batch[key] = torch.stack(tensors) if tensors else np.fromiter(values, dtype=object, count=len(values))
    return batch


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
        self.first_details: dict[str, str] = {}
        """What was wrong with the first row dropped, by reason, in one line."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate cannot be written as UTF-8, and may be the very reason why the row was dropped.
        with Path(self.path or os.devnull).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for line in dropped:
                self.dropped_by_source[line["reason"], line["source"]] += 1
                self.dropped[line["reason"]] += 1
                self.first_details.setdefault(line["reason"], " ".join(line["detail"].split())[:TEXT_CHARACTERS])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.rows = kept.total() + self.dropped.total()
        """Rows kept and dropped."""

    def reasons(self) -> str:
        """Counts by reason in one line, the first row's detail of each, and where each row is recorded."""
        counts = ", ".join(f"{rows:,} {reason}" for reason, rows in self.dropped.most_common())
        counts += "".join(f"; {reason}, first: {detail}" for reason, detail in self.first_details.items())
        where = f"; each dropped row is in {self.path}" if counts and self.path else ""
        return f"{counts or 'none'}{where}"

    def of_sources(self, patterns: Sequence[str]) -> str:
        """A clause about each reason why rows of sources that a pattern matches were dropped, with how to keep them."""
        rows: Counter[str] = Counter()
        for (reason, source), count in self.dropped_by_source.items():
            if any(fnmatchcase(source, pattern) for pattern in patterns):
                rows[reason] += count
        details = {**self.first_details, **DROP_FIXES}
        return "".join(f"; {count:,} dropped as {reason}: {details[reason]}" for reason, count in rows.items())

    def summary(self) -> str:
        """Rows kept and dropped, by reason and source, on one screen."""
        lines = [f"kept {self.kept.total():,} of {self.rows:,} rows, dropped {self.reasons()}"]
        dropped = self.dropped_by_source.most_common(SOURCES_SHOWN)
        lines += [f"  dropped {rows:,} of source {source}: {reason}" for (reason, source), rows in dropped]
        lines += [f"  source {source}: {rows:,}" for source, rows in self.kept.most_common(SOURCES_SHOWN)]
        return "\n".join(lines)


class RLHFDataset(Dataset[dict[str, Any]]):
    """Prompts from a column that already holds messages (``data.prompt_key``), as verl's data preparation writes it.

    A subclass for another layout overrides ``message_column``, ``columns`` and ``read_prompt``.

    Args:
        data_files: parquet file, folder, glob, or a list of these.
        tokenizer: the student's; counts prompt tokens and finds extended ids.
        config: the ``data`` settings.
        processor: None; it is there because verl's data set has it.
        max_samples: read only the first rows; -1: all.
        extend_vocab_start_token: first extended id; None: no extension.
        extended_sources: patterns of the sources whose prompts may hold extended tokens, whatever
            ``data.prompt_extend_tokens`` is.
        dropped_rows_path: JSONL that receives a line per dropped row; None: counts alone.
        tool_schemas: OpenAI function schemas of the tools that the agent loops list in the prompts. They count towards
            a prompt's length, but for rows whose ``agent_name`` is a loop without tools.
        hint_columns: texts that teachers read and the student does not.
        made_rows: the first rows, which the run made itself: they do not count towards the share that is dropped.

    Raises:
        ValueError: files missing or unreadable, the prompt column absent, no row left or more of them dropped than
            ``data.max_dropped_fraction``, an overlong prompt under ``truncation=error``, and bad rows or extended
            tokens where the settings make them an error.
    """

    def __init__(
        self,
        data_files: Files,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        processor: None = None,
        max_samples: int = -1,
        *,
        extend_vocab_start_token: int | None = None,
        extended_sources: Sequence[str] = (),
        dropped_rows_path: str | Path | None = None,
        tool_schemas: list[dict[str, Any]] | None = None,
        hint_columns: Sequence[str] = (),
        made_rows: int = 0,
    ) -> None:
        self.config, self.tokenizer, self._hint_columns = config, tokenizer, hint_columns
        self.epoch = 0
        """The epoch that was set last."""
        self._encoder = PromptEncoder(tokenizer, config, tool_schemas)
        self.files = parquet_files.expand_data_files(data_files)
        self._rows = ParquetRows(self.files, self.columns().union(hint_columns), config.cache_dir)
        self._check_columns()
        if "tools" in parquet_files.column_names(self.files):
            logger.warning("the column tools is not read: tools are those of multi_turn.tool_config_path")
        checker = PromptChecker(
            self._encoder, config, extend_vocab_start_token, extended_sources, self.read_prompt, self._source_of
        )
        self.checks = self._check_rows(checker, max_samples)
        """The check of each row read, in order (``prompt_tokens.CHECK_SCHEMA``)."""
        is_kept = self.checks["reason"].is_null()
        self._kept = np.flatnonzero(is_kept.to_numpy())
        self._has_extended = pc.greater(self.checks["extended"].fill_null(0), 0).to_numpy()
        counts = self.checks["source"].filter(is_kept).value_counts()
        kept = Counter({str(count["values"]): count["counts"].as_py() for count in counts})
        self.drop_report = report = DropReport(dropped_rows_path, kept, self._dropped_rows())
        files = ", ".join(map(str, self.files))
        logger.info("%s: %s", files, report.summary())
        if typed := pc.sum(self.checks["types_special"].filter(is_kept)).as_py():
            logger.warning("special tokens that end or frame turns are typed in %d prompts and become real ones", typed)
        if not len(self):
            fixes = "".join(f"; {fix}" for reason, fix in DROP_FIXES.items() if reason in report.dropped)
            raise ValueError(f"no usable row in {files}: dropped are {report.reasons()}{fixes}")
        of_files = is_kept.to_numpy()[made_rows:]
        if (dropped := (~of_files).mean() if len(of_files) else 0.0) > (most := config.max_dropped_fraction):
            raise ValueError(
                f"{dropped:.1%} of the {len(of_files):,} rows of {files} are dropped, more than "
                f"data.max_dropped_fraction={most}; raise it where this is meant: {report.reasons()}"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """The prompt at place ``item``, with the think switch of the current epoch."""
        index = int(self._kept[item])  # a numpy integer would not survive JSON
        row = self._rows[index]
        prompt, row_id = self.read_prompt(row), self._row_id(row, index)
        switch = think_switch(self.config, row_id, self.epoch)
        messages = self._encoder.fitted(append_switch(prompt.messages, switch))
        entry = {
            "raw_prompt": messages,
            "data_source": self._source_of(row, self.config.reward_fn_key),
            "source": self._source_of(row),
            "reward_model": {"style": prompt.style, "ground_truth": prompt.ground_truth},
            "uuid": row_id,
            "index": index,
            "has_extended": bool(self._has_extended[index]),
            "extra_info": prompt.extra_info,
            "tools_kwargs": prompt.tools_kwargs,
        }
        if "agent_name" in self._rows.columns:
            entry["agent_name"] = row.get("agent_name")
        if self._hint_columns:
            entry["hints"] = {column: text_of(row.get(column)) for column in self._hint_columns}
        if self.config.truncation != "error" and not self.config.filter_overlong_prompts:
            ids, limit = self._encoder.encode([messages], lists_tools(row))[0], self.config.max_prompt_length
            entry["prompt_ids"] = truncate(ids, limit, self.config.truncation) if len(ids) > limit else None
        return entry

    def location(self, index: int) -> tuple[Path, int]:
        """The file of an item's ``index``, and the row number there."""
        return self._rows.location(index)

    @property
    def sources(self) -> list[str]:
        """The source of each item."""
        return self.checks["source"].take(pa.array(self._kept)).to_pylist()

    @property
    def agent_names(self) -> set[str]:
        """The agent loops that items name; "" for those that name none."""
        return {name or "" for name in self._rows.distinct("agent_name", self._kept)}

    @property
    def has_extended(self) -> list[bool]:
        """Of each item, whether its prompt holds extended tokens."""
        return self._has_extended[self._kept].tolist()

    def texts_of(self, column: str, chosen: Iterable[bool]) -> set[str]:
        """The texts of one of ``hint_columns`` in the items that are chosen, each once."""
        return set(map(text_of, self._rows.distinct(column, self._kept[list(chosen)]) - {None}))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose think switches are drawn. Loader processes see it from their next start on."""
        self.epoch = epoch

    def message_column(self) -> str:
        """The column that holds the messages."""
        return self.config.prompt_key

    def columns(self) -> set[str]:
        """Columns to read; those that a file lacks are read as None."""
        sources = {self.config.data_source_key, self.config.reward_fn_key, *SOURCE_COLUMNS}
        return sources | {self.message_column(), "uuid", "agent_name", "reward_model", "extra_info"}

    def read_prompt(self, row: Row) -> PromptRow:
        """Read one row; raises BadRowError where it cannot be used."""
        messages = parse_messages(row.get(self.message_column()))
        reward, extra_info = (mapping_of(row.get(name), name) for name in ("reward_model", "extra_info"))
        return PromptRow(messages, reward.get("ground_truth"), reward.get("style") or "rule", extra_info)

    def _check_columns(self) -> None:
        """Raise ValueError where no file has a column that the settings name."""
        there, columns = self._rows.columns, ", ".join(sorted(parquet_files.column_names(self.files)))
        where = f"in {[str(path) for path in self.files]}, which have {columns}"
        if (column := self.message_column()) not in there:
            raise ValueError(f"no column {column!r} {where}; name that of the messages in data.prompt_key")
        for name in ("data_source_key", "reward_fn_key"):
            if (column := getattr(self.config, name)) not in there.union(SOURCE_COLUMNS):
                raise ValueError(f"data.{name}={column!r} names no column {where}")

    def _check_rows(self, checker: PromptChecker, max_samples: int) -> pa.Table:
        """Checks of the first ``max_samples`` rows (-1: all), read from the cache where they are there."""
        count = len(self._rows) if max_samples < 0 else min(max_samples, len(self._rows))

        def check() -> pa.Table:
            checks = checker.check_rows(islice(self._rows, count))
            return check_table(tqdm(checks, total=count, desc="read prompts", unit="row", disable=None, leave=False))

        # Checks of a user's own class are not kept: nothing here sees its code change.
        encoder = self._encoder.digest() if type(self).__module__.startswith("verl.utils.dataset.") else None
        if encoder is None:
            return check()
        settings = checker.settings() | {"encoder": encoder, "class": type(self).__name__}
        depends_on = {"rows": [*self._rows.digests, count], "settings": settings, "code": parquet_files.code_digest()}
        folder, write = self.config.cache_dir, lambda path: pq.write_table(check(), path)
        kept = parquet_files.cached_file(folder, "checks", ".parquet", write, **depends_on)
        # Not read_table, which would make columns out of folder names such as `a=b`.
        return pq.ParquetFile(kept).read()

    def _dropped_rows(self) -> Iterator[dict[str, Any]]:
        """A line of the drop report per row that is not kept; ValueError at one that the settings make an error."""
        config, is_dropped = self.config, self.checks["reason"].is_valid()
        fixes = {"overlong": "", "extended_tokens": ""}
        # Rows count as overlong only where they are filtered or data.truncation=error.
        if not config.filter_overlong_prompts:
            fixes["overlong"] = "raise data.max_prompt_length, or set data.filter_overlong_prompts=True"
        if config.prompt_extend_tokens == "error":
            fixes["extended_tokens"] = "set data.prompt_extend_tokens=drop, or replace to hide them from the teacher"
        other = "data.on_bad_row=drop leaves such rows out" if config.on_bad_row == "error" else ""
        # A batch at a time: most rows of a large data set may be dropped, each with its detail.
        checks = (check for batch in self.checks.filter(is_dropped).to_batches() for check in batch.to_pylist())
        for index, check in zip(np.flatnonzero(is_dropped.to_numpy()).tolist(), checks, strict=True):
            row, (path, number), reason = self._rows[index], self._rows.location(index), check["reason"]
            if fix := fixes.get(reason, other):
                raise ValueError(f"{path}, row {number}: {check['detail']} ({reason}); {fix}")
            text = text_of(row.get(self.message_column())) or text_of(row.get("segments"))
            place = {"file": str(path), "row": number, "uuid": self._row_id(row, index), "source": check["source"]}
            yield place | {"reason": reason, "detail": check["detail"], "text": text[:TEXT_CHARACTERS]}

    def _source_of(self, row: Row, key: str | None = None) -> str:
        """The row's value of the column ``key``, by default that of ``data.data_source_key``."""
        for column in (key or self.config.data_source_key, *SOURCE_COLUMNS):
            if source := text_of(row.get(column)):
                return source
        return UNKNOWN_SOURCE

    def _row_id(self, row: Row, index: int) -> str:
        path, number = self._rows.location(index)
        # By name and row, not by path: files that were moved keep the ids that think switches are drawn from.
        return text_of(row.get("uuid")) or str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path.name}:{number}"))

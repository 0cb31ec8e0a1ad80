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

Rows that cannot be used are dropped, counted and recorded when the data set is built, never later. Rows stay on disk;
their checks are kept in ``data.cache_dir``, so that the next run over the same data starts at once. Order, batches and
resume belong to the data loader.
"""

import logging
import uuid
from collections.abc import Iterator, Sequence
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
from verl.utils.dataset.parquet_files import (
    ParquetRows,
    Row,
    cached_file,
    code_digest,
    column_names,
    expand_data_files,
)
from verl.utils.dataset.prompt_checker import DropReport, PromptChecker, check_table
from verl.utils.dataset.prompt_rows import (
    PromptRow,
    lists_tools,
    mapping_of,
    parse_messages,
    require_user_turn,
    text_of,
)
from verl.utils.dataset.prompt_tokens import PromptEncoder, append_switch, think_switch, truncate

logger = logging.getLogger(__name__)

SOURCE_COLUMNS = ("source", "data_source")
"""OneRec's and verl's names for the column of the source; each stands in for the other."""
UNKNOWN_SOURCE = "unknown"
TEXT_CHARACTERS = 200
"""How much of a dropped row is written down."""


def collate_fn(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turn B items into one batch: tensors are stacked, everything else becomes an object array of length B.

    Raises ValueError where a tensor key is missing from some items; a missing other key becomes None.
    """
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for item in items for key in item):
        values = [item.get(key) for item in items]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if tensors:
            if len(tensors) < len(items):
                raise ValueError(f"the tensor {key!r} is missing from some of the {len(items)} items of a batch")
            batch[key] = torch.stack(tensors)
        else:
            # np.array would turn lists of equal length into a second dimension.
            batch[key] = np.fromiter(values, dtype=object, count=len(values))
    return batch


class RLHFDataset(Dataset[dict[str, Any]]):
    """Prompts from a column that already holds messages (``data.prompt_key``), as verl's data preparation writes it.

    A subclass for another layout overrides ``message_column``, ``columns`` and ``read_prompt``.

    Args:
        data_files: parquet file, folder, glob, or a list of these.
        tokenizer: the student's; counts prompt tokens and finds extended ids.
        config: the ``data`` settings.
        extend_vocab_start_token: first extended id; None: no extension.
        extended_sources: patterns of the sources whose prompts may hold extended tokens, whatever
            ``data.prompt_extend_tokens`` is.
        dropped_rows_path: JSONL that receives a line per dropped row; None: counts alone.
        max_samples: read only the first rows; -1: all.
        tool_schemas: OpenAI function schemas of the tools that the agent loops list in the prompts. They count towards
            a prompt's length, but for rows whose ``agent_name`` is a loop without tools.

    Raises:
        ValueError: files missing or unreadable, the prompt column absent, no row left or more of them dropped than
            ``data.max_dropped_fraction``, an overlong prompt under ``truncation=error``, and bad rows or extended
            tokens where the settings make them an error.
    """

    caches_checks = True
    """Whether checks are kept between runs. A subclass does not inherit this: nothing here sees its code change."""

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        extend_vocab_start_token: int | None = None,
        extended_sources: Sequence[str] = (),
        dropped_rows_path: str | Path | None = None,
        max_samples: int = -1,
        tool_schemas: list[dict[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self.epoch = 0
        """The epoch that was set last."""
        self._encoder = PromptEncoder(tokenizer, config, tool_schemas)
        self.files = expand_data_files(data_files)
        self._rows = ParquetRows(self.files, self.columns(), config.cache_dir)
        self._check_columns()
        checker = PromptChecker(
            self._encoder, config, extend_vocab_start_token, extended_sources, self.read_prompt, self._source_of
        )
        self.checks = self._check_rows(checker, max_samples)
        """The check of each row read, in order (``prompt_checker.CHECK_SCHEMA``)."""
        is_kept = self.checks["reason"].is_null()
        self._kept = np.flatnonzero(is_kept.to_numpy())
        self._has_extended = pc.greater(self.checks["extended"].fill_null(0), 0).to_numpy()
        self.drop_report = DropReport(dropped_rows_path)
        counts = self.checks["source"].filter(is_kept).value_counts().to_pylist()
        self.drop_report.record_rows({count["values"]: count["counts"] for count in counts}, self._dropped_rows())
        logger.info("%s: %s", ", ".join(path.name for path in self.files[:4]), self.drop_report.summary())
        self._check_losses()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """The prompt at place ``item``, with the think switch of the current epoch."""
        index = int(self._kept[item])  # a numpy integer would not survive JSON
        row = self._rows[index]
        prompt, row_id = self.read_prompt(row), self._row_id(row, index)
        messages = append_switch(prompt.messages, think_switch(self.config, row_id, self.epoch))
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
    def has_extended(self) -> list[bool]:
        """Of each item, whether its prompt holds extended tokens."""
        return self._has_extended[self._kept].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the draws of the think switch. Loader processes see it from their next start on."""
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
        require_user_turn(messages)
        reward_model = mapping_of(row.get("reward_model"), "reward_model")
        return PromptRow(
            messages,
            ground_truth=reward_model.get("ground_truth"),
            style=reward_model.get("style") or "rule",
            extra_info=mapping_of(row.get("extra_info"), "extra_info"),
        )

    def text_of(self, row: Row) -> str:
        """What a dropped row is recognised by."""
        return text_of(row.get(self.message_column()))

    def _check_columns(self) -> None:
        """Raise ValueError where no file has a column that the settings name."""
        files, there = [str(path) for path in self.files], self._rows.columns
        if self.message_column() not in there:
            raise ValueError(
                f"no column {self.message_column()!r} in {files}, which have "
                f"{', '.join(sorted(column_names(self.files)))}; OneRec data has a column 'messages', verl's a column "
                "of prompts that data.prompt_key names"
            )
        for name in ("data_source_key", "reward_fn_key"):
            column = getattr(self.config, name)
            if column not in SOURCE_COLUMNS and column not in there:
                raise ValueError(
                    f"data.{name}={column!r} names no column of {files}; the usual one is {' or '.join(SOURCE_COLUMNS)}"
                )

    def _check_rows(self, checker: PromptChecker, max_samples: int) -> pa.Table:
        """Checks of the first ``max_samples`` rows (-1: all), read from the cache where they are there."""
        count = len(self._rows) if max_samples < 0 else min(max_samples, len(self._rows))

        def check() -> pa.Table:
            checks = checker.check_rows(islice(self._rows, count))
            return check_table(tqdm(checks, total=count, desc="read prompts", unit="row", disable=None, leave=False))

        settings = checker.settings() if vars(type(self)).get("caches_checks") else None
        if settings is None:
            return check()
        kept = cached_file(
            self.config.cache_dir,
            "checks",
            ".parquet",
            lambda path: pq.write_table(check(), path),
            files=self._rows.digests,
            rows=count,
            settings=settings | {"class": type(self).__name__, "code": code_digest()},
        )
        # Not read_table, which would make columns out of folder names such as `a=b`.
        return pq.ParquetFile(kept).read()

    def _dropped_rows(self) -> Iterator[dict[str, Any]]:
        """A line of the drop report per row that is not kept; ValueError at one that the settings make an error."""
        # A batch at a time: most rows of a large data set may be dropped, each with its detail.
        is_dropped = self.checks["reason"].is_valid()
        checks = (check for batch in self.checks.filter(is_dropped).to_batches() for check in batch.to_pylist())
        for index, check in zip(np.flatnonzero(is_dropped.to_numpy()).tolist(), checks, strict=True):
            row, (path, number), reason = self._rows[index], self._rows.location(index), check["reason"]
            if (fix := self._fix_for(reason)) is not None:
                raise ValueError(f"{path}, row {number}: {check['detail']} ({reason}); {fix}")
            yield {
                "file": str(path),
                "row": number,
                "uuid": self._row_id(row, index),
                "source": check["source"],
                "reason": reason,
                "detail": check["detail"],
                "text": self.text_of(row)[:TEXT_CHARACTERS],
            }

    def _check_losses(self) -> None:
        """Raise ValueError where no row is left, or too few."""
        report, most = self.drop_report, self.config.max_dropped_fraction
        files = ", ".join(str(path) for path in self.files)
        where = f"; each dropped row is in {report.path}" if report.path else ""
        if not len(self):
            raise ValueError(f"no usable row in {files}: dropped are {report.reasons() or 'none of 0 rows'}{where}")
        if report.dropped_fraction > most:
            raise ValueError(
                f"{report.dropped_fraction:.1%} of the {report.rows:,} rows of {files} are dropped "
                f"({report.reasons()}), more than data.max_dropped_fraction={most}; give other data or settings, or "
                f"raise it where this is meant{where}"
            )

    def _fix_for(self, reason: str) -> str | None:
        """What to set instead where the settings make this reason an error; None where the row is dropped."""
        # Rows count as overlong only where they are filtered or data.truncation=error.
        if reason == "overlong":
            fix = "raise data.max_prompt_length, or set data.filter_overlong_prompts=True or data.truncation=left"
            return None if self.config.filter_overlong_prompts else fix
        if reason == "extended_tokens":
            fix = "data.prompt_extend_tokens=drop leaves such prompts out, replace hides the tokens from the teacher"
            return fix if self.config.prompt_extend_tokens == "error" else None
        return "data.on_bad_row=drop leaves such rows out" if self.config.on_bad_row == "error" else None

    def _source_of(self, row: Row, key: str | None = None) -> str:
        """The row's value of the column ``key``, by default that of ``data.data_source_key``."""
        for column in (key or self.config.data_source_key, *SOURCE_COLUMNS):
            if row.get(column):
                return text_of(row[column])
        return UNKNOWN_SOURCE

    def _row_id(self, row: Row, index: int) -> str:
        path, number = self._rows.location(index)
        return text_of(row.get("uuid")) or str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path.name}:{number}"))

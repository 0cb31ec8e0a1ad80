"""Prompts for rollouts, from parquet files in verl's layout, and the collation of a batch of them.

In: parquet files with a column of prompts (lists of messages), the student's tokenizer, the ``data`` settings. Out:
one dictionary per prompt:

    raw_prompt    list of {"role", "content"}       uuid          str, the row's own or made from its place
    source        str, for per-source metrics       index         int, row number over all files
    data_source   str, for the reward function      extra_info    dict, for the reward function
    reward_model  {"style", "ground_truth"}         tools_kwargs  dict by tool name
    prompt_ids    list[int] of a cut prompt, None of one that fits; only where data.truncation cuts
    agent_name    str or None; only where the files have that column

Rows that cannot be used are dropped, counted and recorded when the data set is built, never later. Order, batches and
resume belong to the data loader.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.dropped_rows import RowLedger
from verl.utils.dataset.onerec_messages import BadRowError, Message, parse_messages, require_user_turn
from verl.utils.dataset.parquet_files import ParquetRows, Row, expand_data_files
from verl.utils.dataset.prompt_tokens import PromptEncoder, append_switch, possible_switches, think_switch, truncate

if TYPE_CHECKING:
    from verl.trainer.config import DataConfig

logger = logging.getLogger(__name__)

PROMPTS_PER_ENCODE = 256
"""Prompts tokenized at a time while the data set is built."""
SOURCE_COLUMNS = ("source", "data_source")
"""OneRec's and verl's names for the column of the source; each stands in for the other."""
UNKNOWN_SOURCE = "unknown"
LOOPS_WITHOUT_TOOLS = ("single_turn_agent",)
"""Values of ``agent_name`` whose prompts list no tools, whatever tools there are."""


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
            # Filled one by one: np.array would turn lists of equal length into a second dimension.
            column = np.empty(len(values), dtype=object)
            for number, value in enumerate(values):
                column[number] = value
            batch[key] = column
    return batch


@dataclass
class PromptRow:
    """What a data set reads out of one row; errors of ``tools_kwargs`` are those of ``mapping_of``."""

    messages: list[Message]
    ground_truth: Any = None
    style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)

    @property
    def tools_kwargs(self) -> dict[str, Any]:
        """Options of the row's tools, by tool name."""
        return mapping_of(self.extra_info.get("tools_kwargs"), "tools_kwargs")


def mapping_of(value: Any, column: str) -> dict[str, Any]:
    """A cell that should hold a mapping: a struct, JSON text of an object, or nothing.

    Raises:
        BadRowError: with reason ``unreadable_<column>``.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"unreadable_{column}", f"{column} is a text that is no JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRowError(f"unreadable_{column}", f"{column} is a {type(value).__name__}, not a mapping")
    return dict(value)


def lists_tools(row: Row) -> bool:
    """Whether the row's agent loop lists the tools in the prompt; rows that name no loop count as if it did."""
    return row.get("agent_name") not in LOOPS_WITHOUT_TOOLS


class RLHFDataset(Dataset[dict[str, Any]]):
    """Prompts from a column that already holds messages (``data.prompt_key``), as verl's data preparation writes it.

    A subclass for another layout overrides ``message_column``, ``columns`` and ``read_prompt``.

    Args:
        data_files: parquet file, folder, glob, or a list of these.
        tokenizer: the student's; counts prompt tokens and finds extended ids.
        config: the ``data`` settings.
        extend_vocab_start_token: first extended id; None: no extension.
        bad_rows_path: JSONL that receives a line per dropped row; None: counts alone.
        max_samples: read only the first rows; -1: all.
        tool_schemas: OpenAI function schemas of the tools that the agent loops list in the prompts. They count towards
            a prompt's length, but for rows whose ``agent_name`` is a loop without tools.

    Raises:
        ValueError: files missing or unreadable, the prompt column absent, no row left, an overlong prompt under
            ``truncation=error``, and bad rows or extended tokens where ``data`` says ``error``.
    """

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        config: "DataConfig",
        *,
        extend_vocab_start_token: int | None = None,
        bad_rows_path: str | Path | None = None,
        max_samples: int = -1,
        tool_schemas: list[dict[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self._extend_start = extend_vocab_start_token
        self._encoder = PromptEncoder(tokenizer, config, tool_schemas)
        self._rows = ParquetRows(expand_data_files(data_files), self.columns())
        self._check_columns()
        self._cuts = config.truncation != "error" and not config.filter_overlong_prompts
        self._epoch = 0
        with RowLedger(bad_rows_path) as self.ledger:
            self._kept = list(self._select(max_samples))
        logger.info("%s: %s", ", ".join(path.name for path in self._rows.files[:4]), self.ledger.summary())
        if not self._kept:
            raise ValueError(f"no usable row in {[str(path) for path in self._rows.files]}: {self.ledger.summary()}")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """The prompt at place ``item``, with the think switch of the current epoch."""
        index = self._kept[item]
        row = self._rows[index]
        prompt, row_id = self.read_prompt(row), self._row_id(row, index)
        messages = append_switch(prompt.messages, think_switch(self.config, row_id, self._epoch))
        entry = {
            "raw_prompt": messages,
            "data_source": self._source_of(row, self.config.reward_fn_key),
            "source": self._source_of(row, self.config.data_source_key),
            "reward_model": {"style": prompt.style, "ground_truth": prompt.ground_truth},
            "uuid": row_id,
            "index": index,
            "extra_info": prompt.extra_info,
            "tools_kwargs": prompt.tools_kwargs,
        }
        if "agent_name" in self._rows.columns:
            entry["agent_name"] = row.get("agent_name")
        if self._cuts:
            entry["prompt_ids"] = self._cut_ids(messages, lists_tools(row))
        return entry

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of the think switch. Loader processes see it from their next start on."""
        self._epoch = epoch

    def message_column(self) -> str:
        """The column that holds the messages."""
        return self.config.prompt_key

    def columns(self) -> set[str]:
        """Columns to keep in memory; those that a file lacks are read as None."""
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

    def _check_columns(self) -> None:
        if self.message_column() not in self._rows.columns:
            raise ValueError(
                f"no column {self.message_column()!r} in {[str(path) for path in self._rows.files]}; OneRec data has "
                "a column 'messages', verl's a column of prompts that data.prompt_key names"
            )

        for name in ("data_source_key", "reward_fn_key"):
            column = getattr(self.config, name)
            if column not in SOURCE_COLUMNS and column not in self._rows.columns:
                raise ValueError(
                    f"data.{name}={column!r} names no column of {[str(path) for path in self._rows.files]}; "
                    f"the usual one is {' or '.join(SOURCE_COLUMNS)}"
                )

    def _select(self, max_samples: int) -> Iterator[int]:
        """Walk over the rows, book each one in the ledger, and yield the numbers of those that are kept."""
        readable = self._readable_rows(max_samples)
        while block := list(islice(readable, PROMPTS_PER_ENCODE)):
            outcomes = self._check_prompts(block)
            for (index, row, _), bad in zip(block, outcomes, strict=True):
                if bad is None:
                    self.ledger.keep(self._source_of(row, self.config.data_source_key))
                    yield index
                else:
                    self._drop(index, row, bad)

    def _readable_rows(self, max_samples: int) -> Iterator[tuple[int, Row, PromptRow]]:
        limit = max_samples if max_samples >= 0 else None
        for index, row in enumerate(islice(self._rows, limit)):
            try:
                prompt = self.read_prompt(row)
                _ = prompt.tools_kwargs  # read here for its errors
            except BadRowError as bad:
                self._drop(index, row, bad)
            else:
                yield index, row, prompt

    def _check_prompts(self, block: list[tuple[int, Row, PromptRow]]) -> list[BadRowError | None]:
        """For each prompt None, or why its tokens rule it out."""
        first = possible_switches(self.config)[0]
        outcomes: list[BadRowError | None] = [None] * len(block)
        for with_tools in (True, False):
            members = [place for place, (_, row, _) in enumerate(block) if lists_tools(row) == with_tools]
            chats = [block[place][2].messages for place in members]
            switched = [append_switch(messages, first) for messages in chats]
            encoded = self._encoder.encode_each(switched, with_tools) if members else []
            for place, messages, ids in zip(members, chats, encoded, strict=True):
                outcomes[place] = ids if isinstance(ids, BadRowError) else self._check_ids(messages, ids, with_tools)
        return outcomes

    def _check_ids(self, messages: list[Message], ids: list[int], with_tools: bool) -> BadRowError | None:
        config = self.config
        start = self._extend_start
        if start is not None and config.prompt_extend_tokens != "replace":
            extended = sum(token >= start for token in ids)
            if extended:
                return BadRowError("extended_tokens", f"the prompt holds {extended} ids from {start} on")
        if config.filter_overlong_prompts or config.truncation == "error":
            length = self._encoder.longest_length(messages, ids, with_tools)
            if length > config.max_prompt_length:
                return BadRowError("overlong", f"{length} tokens, data.max_prompt_length={config.max_prompt_length}")
        return None

    def _drop(self, index: int, row: Row, bad: BadRowError) -> None:
        """Record the row, or stop where the settings ask for it."""
        path, number = self._rows.location(index)
        fix = self._fix_for(bad.reason)
        if fix is not None:
            raise ValueError(f"{path}, row {number}: {bad.detail} ({bad.reason}); {fix}") from bad
        source = self._source_of(row, self.config.data_source_key)
        text = row.get(self.message_column())
        self.ledger.drop((path, number), self._row_id(row, index), source, bad.reason, bad.detail, text)

    def _fix_for(self, reason: str) -> str | None:
        """What to set instead where the settings make this reason an error; None where the row is dropped."""
        if reason == "overlong":
            fix = "raise data.max_prompt_length, or set data.filter_overlong_prompts=True or data.truncation=left"
            return None if self.config.filter_overlong_prompts else fix
        if reason == "extended_tokens":
            fix = "data.prompt_extend_tokens=drop leaves such prompts out, replace hides the tokens from the teacher"
            return fix if self.config.prompt_extend_tokens == "error" else None
        return "data.on_bad_row=drop leaves such rows out" if self.config.on_bad_row == "error" else None

    def _source_of(self, row: Row, key: str) -> str:
        for column in (key, *SOURCE_COLUMNS):
            if row.get(column):
                return str(row[column])
        return UNKNOWN_SOURCE

    def _row_id(self, row: Row, index: int) -> str:
        path, number = self._rows.location(index)
        return row.get("uuid") or str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path.name}:{number}"))

    def _cut_ids(self, messages: list[Message], with_tools: bool) -> list[int] | None:
        ids = self._encoder.encode([messages], with_tools)[0]
        if len(ids) <= self.config.max_prompt_length:
            return None
        return truncate(ids, self.config.max_prompt_length, self.config.truncation)

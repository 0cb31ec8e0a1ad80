"""What is found out about every row of the data: whether it can be used, and how long its prompt is.

In: rows in order, and the reader and encoder of a data set. Out: one ``RowFact`` per row, in the same order, and the
same as a table. A fact depends on nothing but the row and ``fact_settings``, so it can be kept and read again.

Python reads and renders the rows; the tokenizer counts a block of prompts at a time, on all cores with threads of its
own. Processes would gain nothing where that counting is what takes the time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from verl.utils.dataset.onerec_messages import BadRowError, Message
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.prompt_rows import PromptRow, lists_tools
from verl.utils.dataset.prompt_tokens import PromptEncoder, append_switch, possible_switches

if TYPE_CHECKING:
    from verl.config import DataConfig

PROMPTS_PER_BLOCK = 256
"""Most prompts tokenized together."""
CHARACTERS_PER_BLOCK = 2_000_000
"""Of the prompts tokenized together, beyond which no further one joins: their tokens take some 200 bytes each."""
FACTS_PER_BATCH = 4096
"""Facts held as Python objects at a time."""


@dataclass(frozen=True, slots=True)
class RowFact:
    """What is known of one row."""

    source: str
    reason: str | None = None
    """Why it cannot be used, as a code to count by; None: it can."""
    detail: str | None = None
    """The same for a reader."""
    tokens: int | None = None
    """Of its prompt, with the longest think switch where that may matter; None where there is no prompt to count."""
    extended: int | None = None
    """Those of them that are extended ids."""


FACT_SCHEMA = pa.schema(
    [
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("reason", pa.dictionary(pa.int32(), pa.string())),
        ("detail", pa.string()),
        ("tokens", pa.int32()),
        ("extended", pa.int32()),
    ]
)


def fact_table(facts: Iterable[RowFact]) -> pa.Table:
    """Facts as a table of ``FACT_SCHEMA``, some 20 bytes a row."""
    remaining, batches = iter(facts), []
    while batch := list(islice(remaining, FACTS_PER_BATCH)):
        columns = {name: [getattr(fact, name) for fact in batch] for name in FACT_SCHEMA.names}
        batches.append(pa.RecordBatch.from_pydict(columns, FACT_SCHEMA))
    return pa.Table.from_batches(batches, FACT_SCHEMA)


class PromptChecker:
    """Finds out the facts of rows.

    Args:
        encoder: counts the tokens of prompts.
        config: the ``data`` settings.
        extend_start: first extended id; None: no extension.
        extended_sources: patterns of the sources whose prompts may hold extended tokens.
        read_prompt: reads one row; raises BadRowError.
        source_of: the source of a row.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        config: "DataConfig",
        extend_start: int | None,
        extended_sources: Sequence[str],
        read_prompt: Callable[[Row], PromptRow],
        source_of: Callable[[Row], str],
    ) -> None:
        self._encoder = encoder
        self._config = config
        self._extend_start = extend_start
        self._extended_sources = extended_sources
        self._read_prompt = read_prompt
        self._source_of = source_of
        self._limited = config.filter_overlong_prompts or config.truncation == "error"

    def fact_settings(self) -> dict[str, Any] | None:
        """What facts depend on beside the row, as JSON can hold it; None where the encoder cannot be told by a text."""
        encoder = self._encoder.digest()
        if encoder is None:
            return None
        return {
            "encoder": encoder,
            "extend_start": self._extend_start,
            "prompt_key": self._config.prompt_key,
            "data_source_key": self._config.data_source_key,
            "drop_extended": self._drops_extended,
            "extended_sources": list(self._extended_sources),
            "limit": self._config.max_prompt_length if self._limited else None,
            "switches": possible_switches(self._config),
        }

    def examine(self, rows: Iterable[Row]) -> Iterator[RowFact]:
        """One fact per row, in order."""
        remaining = iter(rows)
        while block := self._next_block(remaining):
            yield from self._examine_block(block)

    def _next_block(self, rows: Iterator[Row]) -> list[tuple[Row, PromptRow | BadRowError]]:
        block: list[tuple[Row, PromptRow | BadRowError]] = []
        characters = 0
        for row in islice(rows, PROMPTS_PER_BLOCK):
            outcome = self._read(row)
            block.append((row, outcome))
            if isinstance(outcome, PromptRow):
                characters += sum(len(message["content"]) for message in outcome.messages)
            if characters >= CHARACTERS_PER_BLOCK:
                break
        return block

    def _read(self, row: Row) -> PromptRow | BadRowError:
        try:
            prompt = self._read_prompt(row)
            _ = prompt.tools_kwargs  # read here for its errors
        except BadRowError as bad:
            return bad
        return prompt

    def _examine_block(self, block: Sequence[tuple[Row, PromptRow | BadRowError]]) -> list[RowFact]:
        facts: list[RowFact | None] = [None] * len(block)
        first = possible_switches(self._config)[0]
        for with_tools in (True, False):
            members = [
                (place, row, prompt.messages)
                for place, (row, prompt) in enumerate(block)
                if isinstance(prompt, PromptRow) and lists_tools(row) == with_tools
            ]
            switched = [append_switch(messages, first) for _, _, messages in members]
            encoded = self._encoder.encode_each(switched, with_tools) if members else []
            for (place, row, messages), ids in zip(members, encoded, strict=True):
                facts[place] = self._judge(self._source_of(row), messages, ids, with_tools)
        for place, (row, bad) in enumerate(block):
            if isinstance(bad, BadRowError):
                facts[place] = RowFact(self._source_of(row), bad.reason, bad.detail)
        return [fact for fact in facts if fact is not None]

    def _judge(self, source: str, messages: list[Message], ids: list[int] | BadRowError, with_tools: bool) -> RowFact:
        if isinstance(ids, BadRowError):
            return RowFact(source, ids.reason, ids.detail)
        tokens, start = len(ids), self._extend_start
        extended = sum(token >= start for token in ids) if start is not None else 0
        if extended and self._drops_extended and not any(fnmatchcase(source, p) for p in self._extended_sources):
            detail = f"the prompt holds {extended} ids from {start} on"
            return RowFact(source, "extended_tokens", detail, tokens, extended)
        if self._limited:
            limit = self._config.max_prompt_length
            tokens = self._encoder.longest_length(messages, ids, with_tools)
            if tokens > limit:
                detail = f"{tokens} tokens, data.max_prompt_length={limit}"
                return RowFact(source, "overlong", detail, tokens, extended)
        return RowFact(source, None, None, tokens, extended)

    @property
    def _drops_extended(self) -> bool:
        return self._config.prompt_extend_tokens != "replace"

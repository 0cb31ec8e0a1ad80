"""From chat messages to prompt tokens: think switch, chat template, length limit, and which rows pass.

In: rows of a data set, or clean messages. Out: token ids exactly as the agent loop feeds them, and a ``RowCheck`` per
row. A check depends on the row, the encoder and ``PromptChecker.settings`` alone, so it can be cached.

Python reads and renders the rows; the tokenizer counts a block of prompts at a time, with its own threads on all cores.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import tokenizers
import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import Row, text_digest
from verl.utils.dataset.prompt_rows import BadRowError, Message, PromptRow, lists_tools
from verl.utils.tokenizer import TEMPLATE_DATE, TOOLS_KEY, fit_tool_calls, render_chat, types_special_tokens

logger = logging.getLogger(__name__)

SWITCHES = {"force_think": (" /think",), "force_nothink": (" /no_think",), "auto": ("", " /think", " /no_think")}
LONGEST_SWITCH_TOKENS = 32
"""More tokens than any switch can add to a prompt: one per byte of it, and some for a word cut anew."""
PROMPTS_PER_BLOCK = 64
"""Prompts tokenized together; each of their tokens takes some 200 bytes until it is counted."""
CHECKS_PER_BATCH = 4096
"""Checks held as Python objects at a time."""
LABEL = pa.dictionary(pa.int32(), pa.string())
CHECK_SCHEMA = pa.schema(
    {"source": LABEL, "reason": LABEL, "detail": pa.string(), "tokens": pa.int32(), "extended": pa.int32()}
    | {"types_special": pa.bool_()}
)


def think_switch(config: DataConfig, row_id: str, epoch: int) -> str:
    """What is appended to the last user turn; in ``auto`` mode drawn from (seed, row, epoch), one third each.

    The draw depends on nothing else, so it is the same for any number of workers and after a resume.
    """
    switches = possible_switches(config)
    digest = hashlib.sha256(f"{config.seed}:{row_id}:{epoch}".encode()).digest()
    return switches[int.from_bytes(digest[:8], "big") % len(switches)]


def possible_switches(config: DataConfig) -> tuple[str, ...]:
    """All that ``think_switch`` may return under this config."""
    return SWITCHES[config.think_mode] if config.enable_think else ("",)


def append_switch(messages: list[Message], switch: str) -> list[Message]:
    """A copy of ``messages`` whose last user turn ends in ``switch``."""
    switched = list(messages)
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is not None:
        switched[last] = {**messages[last], "content": messages[last]["content"] + switch}
    return switched


def truncate(ids: list[int], limit: int, side: str) -> list[int]:
    """Cut ids beyond ``limit`` as verl does: ``left`` keeps the end, ``right`` the beginning, ``middle`` both ends."""
    head = {"left": 0, "right": limit, "middle": limit // 2}[side]
    # Counted from the front: ids[-0:] would be all of them.
    return ids[:head] + ids[len(ids) - (limit - head) :]


class PromptEncoder:
    """Renders and tokenizes prompts with one tokenizer's chat template.

    Args:
        tokenizer: the student's.
        config: the ``data`` settings.
        tool_schemas: OpenAI function schemas, which the template puts into every prompt rendered ``with_tools``.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, tool_schemas: list[dict[str, Any]] | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; add chat_template.jinja")
        self.tokenizer = tokenizer
        self._options = config.apply_chat_template_kwargs
        self._tool_schemas = tool_schemas or None
        for notice in self._notices(config):
            logger.warning("%s", notice)

    def _notices(self, config: DataConfig) -> Iterator[str]:
        """What the chat template does otherwise than the settings ask."""
        template, key = str(self.tokenizer.chat_template), "data.apply_chat_template_kwargs"
        for name in self._options:
            if name not in template:
                yield f"{key}.{name} has no effect: the chat template does not name it"
        if "strftime_now" in template and "date_string" not in self._options:
            date = f"{TEMPLATE_DATE:%d %b %Y}"
            yield f"the chat template writes a date, which is {date} in all prompts; {key}.date_string may change it"
        if config.enable_think and "think" not in template:
            switches = " or ".join(switch.strip() for switch in possible_switches(config) if switch)
            yield (
                f"data.enable_think=True appends {switches} to questions, which the chat template of "
                f"{self.tokenizer.name_or_path} does not know; set data.enable_think=False where a model never thinks"
            )
        if not (config.enable_think or self._tool_schemas):
            return
        question: list[Message] = [{"role": "user", "content": "question"}]
        try:
            ending = self.render(append_switch(question, possible_switches(config)[-1])).rstrip()
            if config.enable_think and config.think_mode != "force_think" and ending.endswith("<think>"):
                mode = f"data.think_mode={config.think_mode}"
                yield f"{mode} has no effect: the chat template opens a thought in any case"
            prompt, names = self.render(question), [tool["function"]["name"] for tool in self._tool_schemas or []]
            if hidden := [name for name in names if name not in prompt]:
                yield f"the chat template of {self.tokenizer.name_or_path} does not show {hidden}, tools of {TOOLS_KEY}"
        except BadRowError:  # a template for other conversations, which rows are checked with
            return

    def digest(self) -> str | None:
        """Digest of all that the ids of a prompt depend on; None for a tokenizer that cannot be written as a text."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            return None
        # Templates and post-processors read special tokens by name, and another version may render or split otherwise.
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        versions = [type(tokenizer).__name__, transformers.__version__, tokenizers.__version__]
        parts = [backend.to_str(), tokenizer.chat_template, special, versions, self._tool_schemas, self._options]
        return text_digest(json.dumps(parts, sort_keys=True))

    def render(self, messages: list[Message], with_tools: bool = True) -> str:
        """The text of a prompt, the opening of the answer included.

        Raises BadRowError ``template`` where the chat template refuses it.
        """
        tools = self._tool_schemas if with_tools else None
        try:
            return render_chat(self.tokenizer, self.fitted(messages), tools, self._options)
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise BadRowError("template", f"the chat template refuses the prompt: {error}") from error

    def fitted(self, messages: list[Message]) -> list[Message]:
        """Messages in the form that the chat template takes."""
        return fit_tool_calls(self.tokenizer, messages)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered prompts; tokenizes the whole list on all cores."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode(self, prompts: Sequence[list[Message]], with_tools: bool = True) -> list[list[int]]:
        """Ids of each prompt; errors as in ``render``."""
        return self.tokenize([self.render(prompt, with_tools) for prompt in prompts])


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
    types_special: bool = False
    """Whether its messages hold special tokens typed as text, which become real ones."""


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
                    types_special = types_special_tokens(self.encoder.tokenizer, str(messages))
                    yield self._check(row, messages, next(ids))._replace(types_special=types_special)
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

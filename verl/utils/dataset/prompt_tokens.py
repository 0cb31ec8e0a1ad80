"""From chat messages to prompt tokens: think switch, chat template, length limit.

In: clean messages. Out: token ids exactly as the agent loop feeds them. Which rows are kept is decided elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import text_digest
from verl.utils.dataset.prompt_rows import BadRowError, Message

THINK, NO_THINK, UNDECIDED = " /think", " /no_think", ""
SWITCHES = {"force_think": (THINK,), "force_nothink": (NO_THINK,), "auto": (UNDECIDED, THINK, NO_THINK)}
LONGEST_SWITCH_TOKENS = 32
"""More tokens than any switch can add to a prompt: one per byte of it, and some for a word cut anew."""


def think_switch(config: DataConfig, row_id: str, epoch: int) -> str:
    """What is appended to the last user turn; in ``auto`` mode drawn from (seed, row, epoch), one third each.

    The draw depends on nothing else, so it is the same for any number of workers and after a resume.
    """
    switches = possible_switches(config)
    digest = hashlib.sha256(f"{config.seed}:{row_id}:{epoch}".encode()).digest()
    return switches[int.from_bytes(digest[:8], "big") % len(switches)]


def possible_switches(config: DataConfig) -> tuple[str, ...]:
    """All that ``think_switch`` may return under this config."""
    return SWITCHES[config.think_mode] if config.enable_think else (UNDECIDED,)


def append_switch(messages: list[Message], switch: str) -> list[Message]:
    """A copy of ``messages`` whose last user turn ends in ``switch``."""
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if not switch or last is None:
        return list(messages)
    turn = messages[last]
    return [*messages[:last], {**turn, "content": turn["content"] + switch}, *messages[last + 1 :]]


def truncate(ids: list[int], limit: int, side: str) -> list[int]:
    """Cut ids beyond ``limit`` as verl does: ``left`` keeps the end, ``right`` the beginning, ``middle`` both ends."""
    head = {"left": 0, "right": limit, "middle": limit // 2}[side]
    return ids[:head] + ids[len(ids) - (limit - head) :]


class PromptEncoder:
    """Renders and tokenizes prompts with one tokenizer's chat template.

    Args:
        tokenizer: the student's.
        config: the ``data`` settings.
        tool_schemas: OpenAI function schemas, which the template puts into every prompt encoded ``with_tools``.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        tool_schemas: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path!r} has no chat template; "
                "add chat_template.jinja to its folder"
            )
        self._tokenizer = tokenizer
        self._config = config
        self._tool_schemas: list[Any] | None = [dict(schema) for schema in tool_schemas or ()] or None

    def digest(self) -> str | None:
        """Digest of all that the ids of a prompt depend on; None for a tokenizer that cannot be written as a text."""
        tokenizer = self._tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            return None
        parts = [
            type(tokenizer).__name__,
            backend.to_str(),
            tokenizer.chat_template,
            # Templates and post-processors read these by name, and another version may render or split otherwise.
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            transformers.__version__,
            tokenizers.__version__,
            self._tool_schemas,
            self._config.apply_chat_template_kwargs,
        ]
        return text_digest(json.dumps(parts, sort_keys=True))

    def encode(self, prompts: Sequence[list[Message]], with_tools: bool = True) -> list[list[int]]:
        """Ids of each prompt, the opening of the answer included. Tokenizes the whole list on all cores.

        Raises BadRowError ``template`` where the chat template refuses one of them.
        """
        try:
            return self._tokenizer.apply_chat_template(
                list(prompts),
                tools=self._tool_schemas if with_tools else None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._config.apply_chat_template_kwargs,
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise BadRowError("template", f"the chat template refuses the prompt: {error}") from error

    def encode_each(self, prompts: Sequence[list[Message]], with_tools: bool = True) -> list[list[int] | BadRowError]:
        """As ``encode``, with the error in its place for each prompt that the template refuses."""
        try:
            return list(self.encode(prompts, with_tools)) if prompts else []
        except BadRowError as error:
            # The template names no prompt, so each is tried alone.
            if len(prompts) == 1:
                return [error]
            return [outcome for prompt in prompts for outcome in self.encode_each([prompt], with_tools)]

    def longest_length(self, messages: list[Message], ids: list[int], with_tools: bool = True) -> int:
        """Most tokens the prompt can have in any epoch; ``ids`` is the prompt with its first possible switch."""
        others = possible_switches(self._config)[1:]
        # Almost every prompt is far from the limit and need not be encoded again with each switch.
        if not others or len(ids) + LONGEST_SWITCH_TOKENS <= self._config.max_prompt_length:
            return len(ids)
        variants = self.encode([append_switch(messages, switch) for switch in others], with_tools)
        return max(len(variant) for variant in (ids, *variants))

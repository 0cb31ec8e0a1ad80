"""From chat messages to prompt tokens: think switch, chat template, length limit.

In: clean messages. Out: token ids exactly as the agent loop feeds them. Which rows are kept is decided elsewhere.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import text_digest
from verl.utils.dataset.prompt_rows import BadRowError, Message

SWITCHES = {"force_think": (" /think",), "force_nothink": (" /no_think",), "auto": ("", " /think", " /no_think")}
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
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path!r} has no chat template; add chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._options = config.apply_chat_template_kwargs
        self._tool_schemas = tool_schemas or None

    def digest(self) -> str | None:
        """Digest of all that the ids of a prompt depend on; None for a tokenizer that cannot be written as a text."""
        tokenizer = self._tokenizer
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
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **self._options
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise BadRowError("template", f"the chat template refuses the prompt: {error}") from error

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered prompts; tokenizes the whole list on all cores."""
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode(self, prompts: Sequence[list[Message]], with_tools: bool = True) -> list[list[int]]:
        """Ids of each prompt; errors as in ``render``."""
        return self.tokenize([self.render(prompt, with_tools) for prompt in prompts])

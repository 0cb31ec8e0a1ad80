"""Messages to token ids: a conversation's prompt, and the tool turn that continues it.

The model's own tokens are never decoded and encoded again: its text may have several tokenisations, and only the one
it sampled has the log-probs that training needs. So a tool turn is encoded alone, as the text that the chat template
puts after an assistant's words. That text begins with the token that ends the assistant's turn, a token of its own that
no tokenisation merges with its neighbours; the model has written it already, and the rest is appended to its tokens.
Prompt, model tokens and appended tokens together are what the template yields for the same conversation, wherever the
model's text has only the tokenisation that it sampled and the template shows it unchanged. Where it shows it otherwise
(a call inside an open thought, say, gets an empty thought before it), the sampled tokens stay.

Special tokens that a tool's result holds as text become real ones, as those that a prompt holds do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from verl.utils.tokenizer import TOOLS_KEY, render_chat

Message = Mapping[str, Any]

# Stands for the assistant's words when a continuation is rendered; any plain text that no template contains.
_ASSISTANT_WORDS = "words-of-the-assistant"
_QUESTION = {"role": "user", "content": "question"}
_RESULT = {"role": "tool", "name": "probe", "content": "result"}


class ChatTemplate:
    """A tokenizer's chat template with the tools and options of this run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_schemas: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Hold the parts; with tools, find the token that ends an assistant's turn.

        Args:
            tool_schemas: OpenAI function schemas shown to the model.
            template_kwargs: options of the template, such as ``enable_thinking``.

        Raises:
            ValueError: there are tools, and the template does not fit them.
        """
        self.tokenizer = tokenizer
        self.tool_schemas: list[Any] = [dict(schema) for schema in tool_schemas]
        self.template_kwargs = dict(template_kwargs or {})
        self.end_of_turn_id: int | None = None
        if self.tool_schemas:
            try:
                ids, problem = self._continuation([_RESULT]), "ends an assistant's turn with no special token"
            except (TemplateError, TypeError, ValueError) as error:
                ids, problem = [], f"takes no message of a tool ({error})"
            # Added tokens are cut out of a text before any merge, so no neighbour can change this one.
            if not ids or ids[0] not in tokenizer.added_tokens_decoder:
                raise ValueError(f"the chat template of {tokenizer.name_or_path} {problem}; unset {TOOLS_KEY}")
            self.end_of_turn_id = ids[0]

    def encode_prompt(self, messages: Sequence[Message], with_tools: bool) -> list[int]:
        """Ids of the conversation up to where the assistant begins to write."""
        return self._encode(self._render(messages, self.tool_schemas if with_tools else []))

    def encode_tool_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids between the assistant's end-of-turn token and the start of its next turn: ``messages`` of tools."""
        return self._continuation(messages)[1:]

    def shows_unchanged(self, words: str) -> bool:
        """Whether the template shows an assistant's turn before a tool's as the model wrote it behind the opening."""
        turns = [_QUESTION, {"role": "assistant", "content": words}, _RESULT]
        return self._render(turns, self.tool_schemas).startswith(self._render([_QUESTION], self.tool_schemas) + words)

    def _continuation(self, messages: Sequence[Message]) -> list[int]:
        opening = [_QUESTION, {"role": "assistant", "content": _ASSISTANT_WORDS}]
        return self._encode(self._render([*opening, *messages], self.tool_schemas).partition(_ASSISTANT_WORDS)[2])

    def _render(self, messages: Sequence[Message], tool_schemas: list[Any]) -> str:
        return render_chat(self.tokenizer, messages, tool_schemas, self.template_kwargs)

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        return self.tokenizer.encode(text, add_special_tokens=False)

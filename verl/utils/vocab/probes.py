"""Texts and chats that both tokenizers have to turn into the same ids.

Equal vocabularies do not make equal tokenizers: merges, normalisation and the cutting into words decide which tokens
a text becomes, and the chat template decides what a conversation looks like. A teacher that is used to other tokens
scores text that it has never seen in that form.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MOST_PROBES_OF_A_KIND = 500

TEXTS = (
    "The answer: 3 + 4 = 7, isn't it? I'd say so; they've LEFT and we'll see.",
    "  two blanks, a\ttab,\n\n   a blank line\r\nand blanks at the end   ",
    "1234567890 3.14159 1,000,000 0x1F 2024-05-06 12:30",
    "def add(first, second):\n    return first + second  # sum\n",
    '{"name": "add", "arguments": {"x": [1, 2.5e-3, null, true], "y": "\\u00e9\\n"}}',
    "café naïve Ångström — „quotes“ … ½ № ﬁn",
    "cafe\u0301 A\u030angstro\u0308m s\u0323\u0307",
    "用户最近看过的商品,价格 ¥1999 元。推荐下一个",
    "日本語 ひらがな カタカナ ﾊﾝｶｸ 한국어",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "👍🏽 👨‍👩‍👧 🇩🇪 😀",
    "\u00a0no-break \u200bzero-width \u2028line \ufeffmark",
    "ABCdefGHI camelCaseWord snake_case_word kebab-case",
    "https://example.org/a?b=c&d=%20#e someone@example.org",
    "aaaaaaaaaaaaaaaaaaaaaa bbbbbbbb !!!!!!!! ======== ........",
    "\\frac{1}{2} \\sum_{i=0}^{n} x_i^2 \\leq \\infty, $5, 100%",
    "<b>bold</b> <!-- note --> &amp; </s> [INST] <unk>",
    "What next? /think",
    "What next? /no_think",
)


@dataclass(frozen=True)
class Chat:
    """A conversation as a run may hand it to the template."""

    name: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    to_be_continued: bool = True


_SYSTEM = {"role": "system", "content": "You are a careful assistant."}
_QUESTION = {"role": "user", "content": "Why is the sky blue?"}
_ANSWER = {"role": "assistant", "content": "The air scatters blue light."}
_THOUGHT = {"role": "assistant", "content": "<think>\nRayleigh.\n</think>\n\nThe air scatters blue light."}
_MORE = {"role": "user", "content": "And at sunset?"}
_ADD = {"name": "add", "arguments": {"first": 2, "second": 3}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}},
            "required": ["first", "second"],
        },
    },
}
_CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _ADD}]}
_RESULT = {"role": "tool", "name": "add", "content": "5"}

CHATS = (
    Chat("a question", [_QUESTION]),
    Chat("system", [_SYSTEM, _QUESTION]),
    Chat("multi-turn", [_SYSTEM, _QUESTION, _ANSWER, _MORE]),
    Chat("answered", [_QUESTION, _ANSWER], to_be_continued=False),
    Chat("think on", [_SYSTEM, _QUESTION], options={"enable_thinking": True}),
    Chat("think off", [_SYSTEM, _QUESTION], options={"enable_thinking": False}),
    Chat("thought before", [_QUESTION, _THOUGHT, _MORE]),
    Chat("tools", [_SYSTEM, _QUESTION], tools=[_TOOL]),
    Chat("tool result", [_QUESTION, _CALL, _RESULT], tools=[_TOOL]),
)


@dataclass(frozen=True)
class Difference:
    """A probe that student and teacher read differently."""

    probe: str
    """The text, or the name of the chat."""
    student: tuple[int, ...] | None
    """Ids of the student; None: its template refuses the chat."""
    teacher: tuple[int, ...] | None
    """Ids of the teacher; of chats, the teacher's text in the student's ids."""

    @property
    def position(self) -> int:
        """Where the ids part ways."""
        student, teacher = self.student or (), self.teacher or ()
        pairs = zip(student, teacher, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(student), len(teacher)))


@dataclass(frozen=True)
class TextComparison:
    """How both tokenizers read the probe texts."""

    probes: int
    """Texts compared."""
    differences: tuple[Difference, ...]
    parts: tuple[str, ...]
    """Parts of the tokenizers whose definitions differ: merges, normalizer, pre_tokenizer."""


def compare_texts(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> TextComparison:
    """Encode the probe texts with both tokenizers, and where their merges differ also what these merge."""
    parts, pieces = _compare_definitions(student, teacher)
    added = [str(token) for token in islice(teacher.added_tokens_decoder.values(), MOST_PROBES_OF_A_KIND)]
    texts = [*TEXTS, *(f"a {token} b{token}c" for token in added), *pieces]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    differences = tuple(
        Difference(text, tuple(of_student), tuple(of_teacher))
        for text, of_student, of_teacher in zip(texts, *ids, strict=True)
        if of_student != of_teacher
    )
    return TextComparison(len(texts), differences, parts)


def compare_chats(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[Difference, ...]:
    """Render the probe chats with both templates and encode what comes out with the student's tokenizer.

    A chat that both templates refuse is no difference. Both tokenizers need a template.
    """
    differences = []
    for chat in CHATS:
        texts = _render(student, chat), _render(teacher, chat)
        ids = [None if text is None else tuple(student.encode(text, add_special_tokens=False)) for text in texts]
        if ids[0] != ids[1]:
            differences.append(Difference(chat.name, *ids))
    return tuple(differences)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str | None:
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=None if chat.tools is None else [dict(tool) for tool in chat.tools],
            add_generation_prompt=chat.to_be_continued,
            tokenize=False,
            **chat.options,
        )
    except (TemplateError, TypeError, ValueError):  # what templates raise on roles and tools they do not know
        return None
    return text


def _compare_definitions(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[tuple[str, ...], list[str]]:
    """Names of the parts that differ, and texts on which different merges should show."""
    if not isinstance(student, PreTrainedTokenizerFast) or not isinstance(teacher, PreTrainedTokenizerFast):
        return (), []
    parts: list[str] = []
    for name in ("normalizer", "pre_tokenizer"):
        ours, theirs = (_state(getattr(side.backend_tokenizer, name)) for side in (student, teacher))
        if ours != theirs:
            parts.append(name)
    ours, theirs = _state(student.backend_tokenizer.model), _state(teacher.backend_tokenizer.model)
    if ours == theirs:
        return tuple(parts), []
    # Only now parsed: the definition of a large vocabulary is megabytes of JSON.
    merges = _merges(ours), _merges(theirs)
    if merges[0] != merges[1]:
        parts.append("merges")
    tokens = islice(_merged_tokens(*merges), MOST_PROBES_OF_A_KIND)
    return tuple(parts), [teacher.convert_tokens_to_string([token]) for token in tokens]


def _state(part: Any) -> bytes:
    """A part of a tokenizer as JSON; empty where there is none."""
    return b"" if part is None else part.__getstate__()


def _merges(model: bytes) -> list[tuple[str, str]]:
    """The merges of a BPE model in order of rank; none of other models."""
    return [(first, second) for first, second in json.loads(model).get("merges", [])]


def _merged_tokens(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> Iterator[str]:
    """Tokens that only one side merges, then those that are merged at another rank."""
    alone = set(ours) ^ set(theirs)
    yield from ("".join(merge) for merge in (*ours, *theirs) if merge in alone)
    for first, second in zip(ours, theirs, strict=False):
        if first != second:
            yield "".join(first)
            yield "".join(second)

"""Texts and chats that both tokenizers have to turn into the same ids.

Equal vocabularies do not make equal tokenizers: merges, normalisation and the cutting into words decide which tokens
a text becomes, and the chat template decides what a conversation looks like. Text in tokens that a teacher was not
trained on gets wrong scores.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MOST_PROBES_OF_A_KIND = 500

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TEXTS: list[str] = _DATA["texts"]
CHATS: list[dict[str, Any]] = _DATA["chats"]
"""``name``, ``messages``, and where they are not the usual ones ``tools``, ``options`` of the template and
``add_generation_prompt``."""


class Difference(NamedTuple):
    """A probe that student and teacher turn into different ids."""

    probe: str
    """The text, or the name of the chat."""
    student: tuple[int, ...] | None
    """Ids of the student; None: its template refuses the chat."""
    teacher: tuple[int, ...] | None
    """Ids of the teacher; of chats, the teacher's text in the student's ids."""

    @property
    def position(self) -> int:
        """The first position at which the ids differ."""
        student, teacher = self.student or (), self.teacher or ()
        pairs = zip(student, teacher, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(student), len(teacher)))


def compare_texts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[int, list[Difference], list[str]]:
    """Encode the probe texts, every added token, and texts that test merges which differ.

    Returns:
        the number of texts, those with different ids, and which parts of the tokenizers are defined differently
        (``normalizer``, ``pre_tokenizer``, ``merges``).
    """
    parts, pieces = _compare_definitions(student, teacher)
    added = [str(token) for token in islice(teacher.added_tokens_decoder.values(), MOST_PROBES_OF_A_KIND)]
    texts = [*TEXTS, *(f"a {token} b{token}c" for token in added), *pieces]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    differences = [
        Difference(text, tuple(of_student), tuple(of_teacher))
        for text, of_student, of_teacher in zip(texts, *ids, strict=True)
        if of_student != of_teacher
    ]
    return len(texts), differences, parts


def compare_chats(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[Difference]:
    """Render the probe chats with both templates and encode the results with the student's tokenizer.

    A chat that both templates refuse counts as equal. Both tokenizers need a template.
    """
    differences = []
    for chat in CHATS:
        texts = _render(student, chat), _render(teacher, chat)
        ids = [None if text is None else tuple(student.encode(text, add_special_tokens=False)) for text in texts]
        if ids[0] != ids[1]:
            differences.append(Difference(chat["name"], *ids))
    return differences


def _render(tokenizer: PreTrainedTokenizerBase, chat: dict[str, Any]) -> str | None:
    continued, options = chat.get("add_generation_prompt", True), chat.get("options", {})
    try:
        text: Any = tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), add_generation_prompt=continued, tokenize=False, **options
        )
    except (TemplateError, TypeError, ValueError):  # what templates raise on roles and tools they do not know
        return None
    return text


def _compare_definitions(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[list[str], list[str]]:
    """Names of the parts that differ, and texts that different merges would cut differently."""
    if not isinstance(student, PreTrainedTokenizerFast) or not isinstance(teacher, PreTrainedTokenizerFast):
        return [], []
    backends = student.backend_tokenizer, teacher.backend_tokenizer

    def states(part: str) -> list[bytes]:
        return [getattr(backend, part).__getstate__() if getattr(backend, part) else b"" for backend in backends]

    parts = [name for name in ("normalizer", "pre_tokenizer") if len(set(states(name))) > 1]
    models = states("model")
    if models[0] == models[1]:
        return parts, []
    # Only now parsed: the definition of a large vocabulary is megabytes of JSON.
    ours, theirs = ([tuple(merge) for merge in json.loads(model).get("merges", [])] for model in models)
    tokens = islice(_merged_tokens(ours, theirs), MOST_PROBES_OF_A_KIND)
    texts = [teacher.convert_tokens_to_string([token]) for token in tokens]
    return [*parts, "merges"] if ours != theirs else parts, texts


def _merged_tokens(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> Iterator[str]:
    """Tokens that one side alone merges, then those that are merged at different ranks."""
    alone = set(ours) ^ set(theirs)
    yield from ("".join(merge) for merge in (*ours, *theirs) if merge in alone)
    for first, second in zip(ours, theirs, strict=False):
        if first != second:
            yield "".join(first)
            yield "".join(second)

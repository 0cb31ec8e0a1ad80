"""What is known of one model of the pair.

In: a model and a tokenizer, folders or hub names. Out: a ``Side``: its tokenizer with every id that it names, and
``SideFacts``, which are plain values. No weights are loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.utils.tokenizer import hf_tokenizer
from verl.utils.vocab.id_ranges import IdRange, to_ranges
from verl.utils.vocab.model_files import read_model_files

THINK_TOKENS = ("<think>", "</think>")


@dataclass(frozen=True)
class SideFacts:
    """Student or teacher in numbers."""

    model: str
    """Folder or hub name of the model."""
    tokenizer: str
    """Folder or hub name of its tokenizer."""
    ids: int
    """Ids that the tokenizer names."""
    gaps: tuple[IdRange, ...]
    """Ids below the largest that name nothing."""
    rows: int | None
    """Rows of the embedding; None: unknown."""
    rows_source: str | None
    """``weights`` or ``config.json``."""
    eos_id: int | None
    """The tokenizer's end token."""
    eos_token: str | None
    """Its text."""
    pad_id: int | None
    """The tokenizer's pad token, or its end token where it has none."""
    pad_token: str | None
    """Its text."""
    think_ids: tuple[int | None, int | None]
    """``<think>`` and ``</think>``."""
    end_ids: tuple[int, ...] | None
    """Every id that ends an answer: tokenizer, config and generation config; None: there is no config."""

    @property
    def padded_rows(self) -> IdRange | None:
        """Rows past the last id; None: none, or unknown."""
        end = self.ids + sum(gap.size for gap in self.gaps)
        return IdRange(end, self.rows - 1) if self.rows is not None and self.rows > end else None


@dataclass(frozen=True)
class Side:
    """A model of the pair, with its tokenizer."""

    role: str
    """``student`` or ``teacher``."""
    facts: SideFacts
    tokenizer: PreTrainedTokenizerBase
    tokens: dict[int, str]
    """Every token by its id."""
    problems: tuple[str, ...]
    """Why the model will not load."""
    notes: tuple[str, ...]
    """What could not be looked up."""

    def name(self, token_id: int | None) -> str:
        """``151645 '<|im_end|>'``."""
        return name_id(token_id, None if token_id is None else self.tokens.get(token_id))


def name_id(token_id: int | None, token: str | None) -> str:
    """An id with its token, as messages and the report show it."""
    if token_id is None:
        return "none"
    return f"{token_id} (unnamed)" if token is None else f"{token_id} {token!r}"


def read_side(
    role: str,
    model: str,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Side:
    """Load a tokenizer and look into a model's files.

    Args:
        role: ``student`` or ``teacher``, for messages.
        model: folder or hub name.
        tokenizer_path: of the tokenizer, where it is not ``model``.
        trust_remote_code: run tokenizer code that ships with the model.
        overrides: entries laid over the model's config.json.

    Raises:
        ValueError: there is no tokenizer, or a file is broken.
    """
    tokenizer = hf_tokenizer(tokenizer_path or model, trust_remote_code=trust_remote_code)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    files = read_model_files(model, overrides)
    eos_id: Any = tokenizer.eos_token_id
    pad_id: Any = tokenizer.pad_token_id
    end_ids = None
    if files.end_ids is not None:
        end_ids = tuple(dict.fromkeys(token for token in (eos_id, *files.end_ids) if token is not None))
    facts = SideFacts(
        model=model,
        tokenizer=tokenizer_path or model,
        ids=len(tokens),
        gaps=_gaps(tokens),
        rows=files.rows,
        rows_source=files.rows_source,
        eos_id=eos_id,
        eos_token=tokens.get(eos_id),
        pad_id=pad_id,
        pad_token=tokens.get(pad_id),
        think_ids=(vocabulary.get(THINK_TOKENS[0]), vocabulary.get(THINK_TOKENS[1])),
        end_ids=end_ids,
    )
    return Side(role, facts, tokenizer, tokens, files.problems, files.notes)


def _gaps(tokens: dict[int, str]) -> tuple[IdRange, ...]:
    end = max(tokens) + 1
    return () if len(tokens) == end else to_ranges(set(range(end)) - tokens.keys())

"""The vocabulary of a model: tokens of its tokenizer, rows of its embedding, ids that end an answer.

In: a model and a tokenizer, folders or hub names. Out: ``ModelVocabulary``. Of weights only the headers are read; a hub
name that is not in the cache costs its two JSON files.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from verl.utils.broken_files import describe_damage, read_json
from verl.utils.tokenizer import hf_tokenizer, listed_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ROW_TENSORS = ("embed_tokens.weight", "lm_head.weight")
THINK_TOKENS = ("<think>", "</think>")


def to_ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """The fewest ranges that hold exactly ``ids``, in order: the first and the last id of each."""
    ranges: list[tuple[int, int]] = []
    for token_id in sorted(ids):
        joins = ranges and token_id == ranges[-1][1] + 1
        first = ranges.pop()[0] if joins else token_id
        ranges.append((first, token_id))
    return ranges


def show_ids(ids: Iterable[int], most: int = 3) -> str:
    """``5-7, 9``; beyond ``most`` ranges the rest is counted."""
    ranges = to_ranges(ids)
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most])
    return f"{shown} and {len(ranges) - most} more ranges" if len(ranges) > most else shown


@dataclass(frozen=True)
class ModelVocabulary:
    """The vocabulary of student or teacher."""

    role: str
    """``student`` or ``teacher``."""
    model: str
    """Folder or hub name of the model."""
    tokenizer_path: str
    """Folder or hub name of its tokenizer."""
    tokenizer: "PreTrainedTokenizerBase"
    tokens: dict[int, str]
    """Every token by its id."""
    rows: int | None
    """Rows of the embedding, or of an lm head with fewer; None: unknown."""
    end_ids: tuple[int, ...]
    """Every id that ends an answer, by tokenizer, config and generation config."""
    problems: list[str]
    """Why the model will not load."""
    notes: list[str]
    """What could not be looked up."""

    @property
    def ids(self) -> int:
        """Number of ids that the tokenizer names."""
        return len(self.tokens)

    @property
    def think_ids(self) -> list[int]:
        """Ids of the think tokens that there are."""
        return sorted(token_id for token_id, token in self.tokens.items() if token in THINK_TOKENS)

    def name(self, token_id: int | None) -> str:
        """``151645 '<|im_end|>'``; ``none`` for None."""
        return "none" if token_id is None else f"{token_id} {self.tokens.get(token_id, '(unnamed)')!r}"

    def as_dict(self) -> dict[str, Any]:
        """The facts by name, as JSON takes them; ranges are pairs of a first and a last id."""
        return {
            "model": self.model,
            "tokenizer": self.tokenizer_path,
            "ids": self.ids,
            "rows": self.rows,
            "padded_rows": to_ranges(range(max(self.tokens) + 1, self.rows or 0)),
            "end_token": self.name(self.tokenizer.eos_token_id),
            "end_ids": self.end_ids,
            "pad_token": self.name(self.tokenizer.pad_token_id),
            "think_ids": self.think_ids,
        }


def read_vocabulary(
    role: str, model: str, tokenizer_path: str | None, trust_remote_code: bool, overrides: Mapping[str, Any] | None
) -> ModelVocabulary:
    """Load a tokenizer and look into a model's files.

    Args:
        role: ``student`` or ``teacher``, for messages.
        model: folder or hub name.
        tokenizer_path: of the tokenizer, where it is not ``model``.
        trust_remote_code: run tokenizer code that ships with the model.
        overrides: entries that replace those of the model's config.json.

    Raises:
        ValueError: there is no tokenizer, or a file cannot be read.
    """
    path, folder = tokenizer_path or model, Path(model).expanduser()
    tokenizer = hf_tokenizer(path, trust_remote_code=trust_remote_code)
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if not folder.is_dir():
        with suppress(OSError, HFValidationError):  # no such model, or no network
            folder = Path(snapshot_download(model, allow_patterns=[CONFIG, GENERATION_CONFIG]))
    config, generation = (read_json(folder / name, "copy the model again") for name in (CONFIG, GENERATION_CONFIG))
    config |= overrides or {}
    end_ids = listed_ids(tokenizer.eos_token_id, config.get("eos_token_id"), generation.get("eos_token_id"))
    # Models of several modalities keep the language model's settings in text_config.
    configured = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    found = _read_rows(folder)
    problems = [
        f"{model}: {name} has {rows} rows, and vocab_size={configured} in {CONFIG}; correct {CONFIG}"
        for name, rows in found.items()
        if configured not in (None, rows)
    ]
    notes = [] if found else [f"{model} holds no weights in safetensors format: vocab_size of {CONFIG} is taken"]
    rows = min(found.values(), default=configured)
    return ModelVocabulary(role, model, path, tokenizer, tokens, rows, end_ids, problems, notes)


def _read_rows(folder: Path) -> dict[str, int]:
    """Rows of embedding and lm head by tensor name, as far as there are weights."""
    rows: dict[str, int] = {}
    for path in folder.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="np") as weights:
                names = [name for name in weights.keys() if name.endswith(ROW_TENSORS)]  # noqa: SIM118
                # get_slice reads the header alone, so it does not matter that numpy has no bf16.
                rows |= {name: weights.get_slice(name).get_shape()[0] for name in names}
        except (OSError, SafetensorError) as error:
            reason = describe_damage(path, error, "copy the model again")
            raise ValueError(f"the weights {path} cannot be read: {reason}") from error
    # Helper modules, such as heads for several tokens, have longer names than the model's own tensor.
    own = [min((name for name in rows if name.endswith(end)), key=len, default="") for end in ROW_TENSORS]
    return {name: rows[name] for name in own if name}

"""What a model's tokenizer and files say about its vocabulary.

In: a model and a tokenizer, folders or hub names. Out: `ModelVocabulary`. Of weights only the headers are read; a hub
name that is not in the cache costs its two JSON files.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from verl.utils.tokenizer import hf_tokenizer

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ROW_TENSORS = ("embed_tokens.weight", "lm_head.weight")
THINK_TOKENS = ("<think>", "</think>")


class IdRange(NamedTuple):
    """Ids ``first`` to ``last``, both of them included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def to_ranges(ids: Iterable[int]) -> tuple[IdRange, ...]:
    """The fewest ranges that hold exactly ``ids``, in order."""
    ranges: list[IdRange] = []
    for token_id in sorted(ids):
        if ranges and token_id == ranges[-1].last + 1:
            ranges[-1] = IdRange(ranges[-1].first, token_id)
        else:
            ranges.append(IdRange(token_id, token_id))
    return tuple(ranges)


def count_ids(ranges: Sequence[IdRange]) -> int:
    """Number of ids in ``ranges``."""
    return sum(last - first + 1 for first, last in ranges)


def show_ranges(ranges: Sequence[IdRange], most: int = 3) -> str:
    """``5-7, 9``; beyond ``most`` ranges the rest is counted."""
    shown = ", ".join(map(str, ranges[:most]))
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
    tokenizer: PreTrainedTokenizerBase
    tokens: dict[int, str]
    """Every token by its id."""
    rows: int | None = None
    """Rows of the embedding, or of an lm head with fewer; None: unknown."""
    rows_source: str | None = None
    """``weights`` or ``config.json``."""
    end_ids: tuple[int, ...] | None = None
    """Every id that ends an answer, by tokenizer, config and generation config; None: there is no config."""
    problems: tuple[str, ...] = field(default=())
    """Why the model will not load."""
    notes: tuple[str, ...] = field(default=())
    """What could not be looked up."""

    @property
    def ids(self) -> int:
        """Number of ids that the tokenizer names."""
        return len(self.tokens)

    @property
    def gaps(self) -> tuple[IdRange, ...]:
        """Ids below the largest that name nothing."""
        end = max(self.tokens) + 1
        return () if self.ids == end else to_ranges(set(range(end)) - self.tokens.keys())

    @property
    def padded_rows(self) -> IdRange | None:
        """Rows past the last id; None: none, or unknown."""
        end = max(self.tokens) + 1
        return IdRange(end, self.rows - 1) if self.rows is not None and self.rows > end else None

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    @property
    def pad_id(self) -> int | None:
        """The tokenizer's pad token, or its end token where it has none."""
        return self.tokenizer.pad_token_id  # type: ignore[return-value]

    @property
    def think_ids(self) -> tuple[int | None, int | None]:
        """``<think>`` and ``</think>``; None: no such token."""
        by_token = {token: token_id for token_id, token in self.tokens.items() if token in THINK_TOKENS}
        return by_token.get(THINK_TOKENS[0]), by_token.get(THINK_TOKENS[1])

    def name(self, token_id: int | None) -> str:
        """``151645 '<|im_end|>'``."""
        if token_id is None:
            return "none"
        return f"{token_id} {self.tokens[token_id]!r}" if token_id in self.tokens else f"{token_id} (unnamed)"

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; ranges are pairs of a first and a last id."""
        names = "model ids gaps rows rows_source padded_rows eos_id pad_id think_ids end_ids"
        return {name: getattr(self, name) for name in names.split()} | {
            "tokenizer": self.tokenizer_path,
            "eos_token": None if self.eos_id is None else self.tokens.get(self.eos_id),
            "pad_token": None if self.pad_id is None else self.tokens.get(self.pad_id),
        }


def read_vocabulary(
    role: str,
    model: str,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> ModelVocabulary:
    """Load a tokenizer and look into a model's files.

    Args:
        role: ``student`` or ``teacher``, for messages.
        model: folder or hub name.
        tokenizer_path: of the tokenizer, where it is not ``model``.
        trust_remote_code: run tokenizer code that ships with the model.
        overrides: entries that replace those of the model's config.json.

    Raises:
        ValueError: there is no tokenizer, a path leads nowhere, or a JSON file cannot be parsed.
    """
    path = tokenizer_path or model
    tokenizer = hf_tokenizer(path, trust_remote_code=trust_remote_code)
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    return ModelVocabulary(role, model, path, tokenizer, tokens, **_read_files(model, tokenizer, overrides or {}))


def _read_files(model: str, tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Rows, end tokens, problems and notes, as `ModelVocabulary` has them."""
    folder = _find_folder(model)
    config = _read_json(folder / CONFIG) if folder else None
    if folder is None or config is None:
        return {"notes": (f"{model} holds no {CONFIG}: its embedding rows are unknown",)}
    config = config | dict(overrides)
    ends = [tokenizer.eos_token_id]
    for values in (config, _read_json(folder / GENERATION_CONFIG) or {}):
        eos = values.get("eos_token_id")
        ends += eos if isinstance(eos, list) else [eos]
    configured = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    found: dict[str, Any] = {"end_ids": tuple(dict.fromkeys(token for token in ends if token is not None))}
    rows, problem = _read_rows(folder)
    if problem or not rows:
        found |= {"rows": configured, "rows_source": CONFIG}
        note = f"{model} holds no weights in safetensors format: its rows are taken from {CONFIG}"
        return found | ({"problems": (f"{model}: {problem}",)} if problem else {"notes": (note,)})
    problems = tuple(
        f"{model}: {name} has {count} rows, and vocab_size={configured} in {CONFIG}; correct {CONFIG}"
        for name, count in rows.items()
        if configured is not None and count != configured
    )
    return found | {"rows": min(rows.values()), "rows_source": "weights", "problems": problems}


def _find_folder(model: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith(("/", ".", "~")):
        raise ValueError(f"the model folder {model!r} does not exist; correct the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=[CONFIG, GENERATION_CONFIG]))
    except (OSError, HFValidationError):  # no such model, no network, or a name that the hub does not allow
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; copy the model again")
    return values


def _read_rows(folder: Path) -> tuple[dict[str, int], str]:
    """Rows of embedding and lm head by tensor name, as far as there are weights, and why weights cannot be read."""
    from safetensors import SafetensorError, safe_open

    rows: dict[str, int] = {}
    try:
        index = _read_json(folder / WEIGHTS_INDEX)
        if index is not None:
            files = {name: folder / file for name, file in index["weight_map"].items()}
        elif (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, framework="np") as weights:
                files = dict.fromkeys(weights.keys(), folder / WEIGHTS)
        else:
            return rows, ""
        for suffix in ROW_TENSORS:
            matches = [name for name in files if name == suffix or name.endswith(f".{suffix}")]
            # Helper modules, such as heads for several tokens, have longer names than the model's own tensor.
            for name in sorted(matches, key=len)[:1]:
                with safe_open(files[name], framework="np") as weights:
                    rows[name] = weights.get_slice(name).get_shape()[0]
    except FileNotFoundError as error:
        return rows, f"a file of the weights is missing ({error}); copy the model again"
    except SafetensorError as error:
        return rows, f"the weights cannot be read ({error}); copy the model again"
    return rows, ""

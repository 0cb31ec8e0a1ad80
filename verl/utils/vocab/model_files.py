"""Row counts and end tokens of a model, from its JSON files and the headers of its weights.

In: a model's folder or hub name. Out: ``ModelFiles``. A hub name costs its two JSON files where they are not in the
cache; weights are never fetched, and of weights that are there only the headers are read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say of its vocabulary."""

    rows: int | None = None
    """Rows of the embedding, or of an lm head with fewer; None: unknown."""
    rows_source: str | None = None
    """The file that ``rows`` was read from."""
    end_ids: tuple[int, ...] | None = None
    """End tokens of config and generation config; None: there is no config.json."""
    problems: tuple[str, ...] = ()
    """Why the model will not load."""
    notes: tuple[str, ...] = ()
    """What could not be looked up."""


def read_model_files(model: str, overrides: Mapping[str, Any] | None = None) -> ModelFiles:
    """Look into a model's folder.

    Args:
        model: folder or hub name.
        overrides: entries laid over config.json.

    Raises:
        ValueError: a path that leads nowhere, or a JSON file that is none.
    """
    folder = _find_folder(model)
    config = _read_json(folder / CONFIG) if folder else None
    if folder is None or config is None:
        return ModelFiles(notes=(f"{model} holds no {CONFIG}: its embedding rows are unknown",))
    config = {**config, **(overrides or {})}
    generation = _read_json(folder / GENERATION_CONFIG) or {}
    end_ids = (*_as_ids(config.get("eos_token_id")), *_as_ids(generation.get("eos_token_id")))
    configured = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    rows, problem = _read_rows(folder)
    if problem:
        return ModelFiles(configured, CONFIG, end_ids, problems=(f"{model}: {problem}",))
    if not rows:
        note = f"{model} holds no weights in safetensors format: its rows are taken from {CONFIG}"
        return ModelFiles(configured, CONFIG, end_ids, notes=(note,))
    problems = [
        f"{model}: {name} has {count} rows, and vocab_size={configured} in {CONFIG}; correct {CONFIG}"
        for name, count in rows.items()
        if configured is not None and count != configured
    ]
    return ModelFiles(min(rows.values()), "weights", end_ids, problems=tuple(problems))


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


def _as_ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_rows(folder: Path) -> tuple[dict[str, int], str]:
    """Rows by tensor name, as far as there are weights, and what is wrong with those that cannot be read."""
    from safetensors import SafetensorError, safe_open

    rows: dict[str, int] = {}
    try:
        for name, file in _row_tensors(folder).items():
            with safe_open(file, framework="np") as weights:
                rows[name] = weights.get_slice(name).get_shape()[0]
    except FileNotFoundError as error:
        return rows, f"a file of the weights is missing ({error}); copy the model again"
    except SafetensorError as error:
        return rows, f"the weights cannot be read ({error}); copy the model again"
    return rows, ""


def _row_tensors(folder: Path) -> dict[str, Path]:
    """Names of the embedding and of the lm head, where the model has one of its own, with the files they are in."""
    from safetensors import safe_open

    index = _read_json(folder / WEIGHTS_INDEX)
    if index is not None:
        files = {name: folder / file for name, file in index["weight_map"].items()}
    elif (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="np") as weights:
            files = dict.fromkeys(weights.keys(), folder / WEIGHTS)
    else:
        return {}
    names = (_shortest_ending_with(suffix, files) for suffix in (EMBEDDING, HEAD))
    return {name: files[name] for name in names if name is not None}


def _shortest_ending_with(suffix: str, names: Iterable[str]) -> str | None:
    """The model's own tensor: those of helper modules, such as multi-token heads, have longer names."""
    matches = [name for name in names if name == suffix or name.endswith(f".{suffix}")]
    return min(matches, key=len, default=None)

"""Reads a training run into what the page shows.

In:  a run's folder (``metrics.jsonl``, ``config.yaml``) and the folders of its answers (``<step>.tokens.parquet`` and
``<step>.jsonl``, docs/metrics.md). Out: curves, a row of figures an answer, and packed numbers of each token. Not here:
the page.
"""

import base64
import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDERS = {"training": ("rollout_data_dir", "--rollouts"), "validation": ("validation_data_dir", "--validation")}
"""Kinds of answers, and the setting of ``trainer`` and the option that name the folder of each."""
NUMBERS = ("student_log_prob", "teacher_log_prob", "signal", "entropy", "extend_mass")
"""Columns of float32 over an answer's tokens; unknown is NaN."""
SUFFIX = ".tokens.parquet"

Curves = dict[str, tuple[list[int], list[float | None]]]
"""Metric to its steps, ascending, and its values there; None where the run had no finite number."""


@dataclass
class Run:
    """A run, as far as the page shows it."""

    folder: Path
    curves: Curves
    answers: list[dict[str, Any]] = field(default_factory=list)
    """See `read_record`; also ``kind`` (training or validation)."""
    tokens: dict[str, str] = field(default_factory=dict)
    """``<kind>-<step>`` to the packed numbers of its answers' tokens."""
    total: int = 0
    """Answers that the run recorded, shown or not."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what is missing."""


def read_run(folder: Path, given: Mapping[str, Path | None], limit: int) -> Run:
    """A run with its newest answers.

    Args:
        folder: of the run, ``trainer.default_local_dir``.
        given: folders of training and validation answers; None: the one that ``config.yaml`` names.
        limit: most answers, of both kinds together; those of the newest steps are taken.

    Raises:
        ValueError: the run's folder or a given one does not exist.
    """
    import pyarrow.parquet as pq

    if not folder.is_dir():
        raise ValueError(f"RUN={folder} is no folder; name the run's trainer.default_local_dir")
    run = Run(folder, read_curves(folder / "metrics.jsonl"))
    if not run.curves:
        run.notes.append(f"{folder / 'metrics.jsonl'} holds no metrics; trainer.logger needs file for curves.")
    found, run.notes[len(run.notes) :] = answer_folders(folder, given)
    # Records of later steps are of another run in this folder; one step is recorded before it is logged.
    last = max((steps[-1] + 1 for steps, _ in run.curves.values()), default=math.inf)
    records = [(step, kind, path) for kind, place in found.items() for step, path in _records(place) if step <= last]
    for step, kind, path in sorted(records, reverse=True):
        try:
            rows = pq.read_metadata(path).num_rows
            if (count := min(rows, limit - len(run.answers))) > 0:
                taken, run.tokens[f"{kind}-{step}"] = read_record(path, count, _stamp(path))
                run.answers += [{"kind": kind, **row} for row in taken]
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these kinds too
            run.notes.append(f"{path} cannot be read and is left out: {error}")
            continue
        run.total += rows
    if len(run.answers) < run.total:
        shown = f"{len(run.answers):,} of {run.total:,} answers"
        run.notes.append(f"The page shows {shown}: the newest; --answers shows more.")
    return run


def read_curves(path: Path) -> Curves:
    """Every metric of a ``metrics.jsonl``; of a step that comes twice the last value. Reading ends at a line that was
    not finished, and a file that is not there holds none.
    """
    by_name: dict[str, dict[int, float | None]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        for name, value in record["data"].items():
            by_name.setdefault(name, {})[record["step"]] = value
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in by_name.items()}


def answer_folders(run: Path, given: Mapping[str, Path | None]) -> tuple[dict[str, Path], list[str]]:
    """The folders of answers by kind, and sentences on those that are not there.

    Raises:
        ValueError: a given folder does not exist.
    """
    import yaml

    config = run / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")).get("trainer", {}) if config.is_file() else {}
    found, notes = {}, []
    for kind, (key, option) in FOLDERS.items():
        named = settings.get(key)
        if (folder := given.get(kind)) is not None:
            if not folder.is_dir():
                raise ValueError(f"the folder of {kind} answers, {folder}, does not exist")
            found[kind] = folder
        elif named is not None:
            places = _places(run, Path(named), Path(settings.get("default_local_dir") or "."))
            if (place := next((place for place in places if place.is_dir()), None)) is not None:
                found[kind] = place
            else:
                notes.append(f"trainer.{key}={named} is not there; name the folder with {option}.")
    if not found and not notes:
        notes.append("The run records no answers; trainer.rollout_data_dir and trainer.validation_data_dir do.")
    return found, notes


def _places(run: Path, named: Path, run_as_set: Path) -> list[Path]:
    """Where a folder of the settings may be: from where the run was started, from here, and around the run."""
    run = run.absolute()
    # First beside the metrics, for a run that was moved, and another one at the old place.
    moved = [run / named.relative_to(run_as_set)] if named.is_relative_to(run_as_set) else []
    if named.is_absolute():
        return [*moved, named, run / named.name, run.parent / named.name]
    parts = run_as_set.parts
    started_in = (
        [run.parents[len(parts) - 1]] if not run_as_set.is_absolute() and run.parts[-len(parts) :] == parts else []
    )
    return [*moved, *(place / named for place in (*started_in, Path(), run, *run.parents))]


def _records(folder: Path) -> list[tuple[int, Path]]:
    """The records of a folder with their steps."""
    named = [(path.name.removesuffix(SUFFIX), path) for path in folder.glob(f"*{SUFFIX}")]
    return [(int(step), path) for step, path in named if step.isdecimal()]


def _stamp(path: Path) -> tuple[tuple[int, int], ...]:
    """What changes when a record or the lines beside it change."""
    files = (file.stat() for file in (path, _lines_beside(path)) if file.is_file())
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in files)


def _lines_beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + ".jsonl")


@lru_cache(maxsize=10_000)
def read_record(path: Path, limit: int, stamp: tuple[tuple[int, int], ...]) -> tuple[list[dict[str, Any]], str]:
    """The first answers of a record. ``--serve`` asks at each reload; with another ``stamp`` the file is read again.

    Returns:
        A dict an answer: the record's columns of one value, ``row`` (its place in the record), ``first`` (where its
        tokens begin among the record's), ``items`` and ``trained`` (numbers of tokens), what `_figures` gives,
        ``prompt``, ``expected`` and ``text`` (of the lines beside it; None where these are not there, for ``text`` the
        tokens joined). And the numbers of the tokens, as `_packed` describes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    whole = pq.read_table(path)
    table = whole.slice(0, limit)
    texts, states = (_flat(table[name]).cast("string") for name in ("text", "state"))
    items = _flat(table["is_item"]).to_numpy(zero_copy_only=False)
    numbers = {name: _flat(table[name]).to_numpy(zero_copy_only=False).astype("<f4") for name in NUMBERS}
    ids, first, places = np.unique(_flat(table["token_id"]).to_numpy(), return_index=True, return_inverse=True)
    trained, states = pc.equal(states, "trained").to_numpy(zero_copy_only=False), states.dictionary_encode()
    head = {"ids": ids.tolist(), "texts": texts.take(first).to_pylist(), "states": states.dictionary.to_pylist()}
    columns = [places.astype("<u4"), *numbers.values(), states.indices.to_numpy().astype("u1"), items.astype("u1")]

    rows = table.drop_columns([each.name for each in table.schema if pa.types.is_list(each.type)]).to_pylist()
    lines, start = _lines(_lines_beside(path), whole.num_rows), 0
    for place, row in enumerate(rows):
        end = start + row["response_length"]
        mask = trained[start:end]
        line = lines[place] if place < len(lines) else {"output": "".join(texts[start:end].to_pylist())}
        row |= {"row": place, "first": start, "trained": int(mask.sum()), "items": int(items[start:end].sum())}
        row |= {"prompt": line.get("input"), "expected": _as_text(line.get("gts")), "text": line["output"]}
        row |= _figures(row["signal_name"], {name: values[start:end][mask] for name, values in numbers.items()})
        start = end
    return rows, _packed(head, columns)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(column: Any) -> Any:
    """All values of a column of lists as one array."""
    import pyarrow as pa

    return pa.concat_arrays([chunk.flatten() for chunk in column.chunks])


def _figures(signal_name: str | None, trained: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An answer's ``measure``: the signal; where the record has none, as in validation, the log-prob of the student
    less that of the teacher.

    Of its finite values at trained tokens: ``known``, their number; ``sum``; ``largest``, the one farthest from 0.
    Nats; None where there are none.
    """
    values, measure = trained["signal"].astype(np.float64), signal_name
    if measure is None:
        values, measure = trained["student_log_prob"].astype(np.float64) - trained["teacher_log_prob"], "difference"
    values = values[np.isfinite(values)]
    if not len(values):
        return {"measure": measure, "known": 0, "sum": None, "largest": None}
    largest = float(values[np.abs(values).argmax()])
    return {"measure": measure, "known": len(values), "sum": float(values.sum()), "largest": largest}


def _lines(path: Path, rows: int) -> list[dict[str, Any]]:
    """The lines beside a record of so many rows; none where there are more or fewer."""
    # Texts hold separators of lines that ``splitlines`` would split at.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines] if len(lines) == rows else []


def _packed(head: Mapping[str, Any], columns: list[np.ndarray]) -> str:
    """Base64 of a gzip of: the length of ``head`` as JSON, four bytes; ``head``; each column, its first bytes first.

    Numbers that are alike share their high bytes, which are small together.
    """
    text = json.dumps(head).encode()
    planes = [column.view("u1").reshape(len(column), -1).T.tobytes() for column in columns]
    return pack(b"".join([len(text).to_bytes(4, "little"), text, *planes]))


def pack(data: bytes) -> str:
    """Base64 of a gzip."""
    return base64.b64encode(gzip.compress(data, 3, mtime=0)).decode()

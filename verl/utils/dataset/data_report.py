"""What a data set holds and which of its rows a run would drop, on one screen.

In: files and a tokenizer. Out: a ``DataReport`` to print, or as JSON: rows kept and dropped by reason and source,
lengths of the prompts, the share with extended tokens, three examples as the model reads them. Everything comes from
the data set that a run would build, so the report cannot differ from the run.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from verl.config import DataConfig
from verl.utils.dataset.factory import create_rl_dataset
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import hf_tokenizer

PERCENTILES = (0, 10, 50, 90, 99, 100)
EXAMPLES = 3
SOURCES_SHOWN = 12
FILES_SHOWN = 4
HEAD_CHARACTERS, TAIL_CHARACTERS = 280, 120
"""Of an example's prompt in the printed report."""
LINES_SHOWN = 7
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Example:
    """One kept row as the model reads it."""

    file: str
    row: int
    uuid: str
    source: str
    tokens: int
    prompt: str
    ground_truth: Any


@dataclass(frozen=True)
class DataReport:
    """What was found; counts are rows."""

    files: list[str]
    tokenizer: str
    extend_vocab_start_token: int | None
    max_prompt_length: int | None
    rows: int
    kept: dict[str, int]
    """By source, the most frequent first."""
    dropped: dict[str, dict[str, int]]
    """By reason and source."""
    prompt_tokens: dict[str, dict[str, int]]
    """Percentiles of the lengths of ``kept`` prompts and of ``all`` that could be counted."""
    counted_prompts: int
    """Prompts whose tokens could be counted."""
    with_extended_tokens: int | None
    """Those of them that hold extended tokens; None where no threshold is given."""
    examples: list[Example]


def read_report(
    files: Sequence[str], tokenizer_path: str, extend_vocab_start_token: int | None, max_prompt_length: int | None
) -> DataReport:
    """Build the data set and describe it.

    Raises:
        ValueError: files or tokenizer cannot be read, or no row can be used.
    """
    config = DataConfig(
        max_prompt_length=UNLIMITED if max_prompt_length is None else max_prompt_length,
        filter_overlong_prompts=True,
        max_dropped_fraction=1.0,
    )
    tokenizer = hf_tokenizer(tokenizer_path)
    dataset = create_rl_dataset(list(files), tokenizer, config, extend_vocab_start_token=extend_vocab_start_token)
    facts, ledger = dataset.facts, dataset.ledger
    counted = facts.filter(pc.is_valid(facts["tokens"]))
    kept = counted.filter(pc.is_null(counted["reason"]))
    extended = pc.sum(pc.greater(counted["extended"], 0)).as_py() or 0
    dropped: dict[str, dict[str, int]] = {reason: {} for reason, _ in ledger.dropped.most_common()}
    for (reason, source), rows in ledger.dropped_by_source.most_common():
        dropped[reason][source] = rows
    return DataReport(
        files=[str(path) for path in dataset.files],
        tokenizer=tokenizer_path,
        extend_vocab_start_token=extend_vocab_start_token,
        max_prompt_length=max_prompt_length,
        rows=ledger.rows,
        kept=dict(ledger.kept.most_common()),
        dropped=dropped,
        prompt_tokens={"kept": _percentiles(kept["tokens"]), "all": _percentiles(counted["tokens"])},
        counted_prompts=len(counted),
        with_extended_tokens=None if extend_vocab_start_token is None else extended,
        examples=_examples(dataset, tokenizer),
    )


def _percentiles(tokens: Any) -> dict[str, int]:
    values = np.percentile(tokens.to_numpy(), PERCENTILES, method="nearest").astype(int).tolist()
    return dict(zip((f"p{percent}" for percent in PERCENTILES), values, strict=True))


def _examples(dataset: RLHFDataset, tokenizer: Any) -> list[Example]:
    """Kept rows from the beginning, the middle and the end."""
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})[:EXAMPLES]
    examples = []
    for entry in (dataset[place] for place in places):
        path, row = dataset.location(entry["index"])
        text = tokenizer.apply_chat_template(entry["raw_prompt"], tokenize=False, add_generation_prompt=True)
        examples.append(
            Example(
                file=str(path),
                row=row,
                uuid=entry["uuid"],
                source=entry["source"],
                tokens=dataset.facts["tokens"][entry["index"]].as_py(),
                prompt=text,
                ground_truth=entry["reward_model"]["ground_truth"],
            )
        )
    return examples


def render(report: DataReport) -> str:
    """The report for people."""
    kept = sum(report.kept.values())
    lines = [
        f"{kept:,} of {report.rows:,} rows kept ({kept / report.rows:.1%}), {report.rows - kept:,} dropped",
        f"  files      {_files(report.files)}",
        f"  tokenizer  {report.tokenizer}",
    ]
    lines += ["", *_source_table(report)]
    if report.dropped:
        lines += ["", f"{'dropped because':<28}{'rows':>9}  of source"]
        lines += [_reason_line(reason, sources) for reason, sources in report.dropped.items()]
        if (report.rows - kept) / report.rows > DataConfig.max_dropped_fraction:
            lines.append(f"  a run stops here unless data.max_dropped_fraction > {DataConfig.max_dropped_fraction}")
    lines += ["", "prompt tokens   " + "".join(f"{f'p{percent}':>8}" for percent in PERCENTILES)]
    for name, values in report.prompt_tokens.items():
        lines.append(f"  {name:<14}" + "".join(f"{value:>8,}" for value in values.values()))
    lines.append(f"  limit {'none' if report.max_prompt_length is None else f'{report.max_prompt_length:,}'}")
    lines += ["", _extended_line(report)]
    for number, example in enumerate(report.examples, 1):
        lines += ["", *_example_lines(number, example)]
    return "\n".join(lines)


def _files(files: Sequence[str]) -> str:
    shown = ", ".join(files[:FILES_SHOWN])
    rest = len(files) - FILES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _source_table(report: DataReport) -> list[str]:
    dropped: Counter[str] = Counter()
    for sources in report.dropped.values():
        dropped.update(sources)
    rows = Counter(report.kept) + dropped
    lines = [f"{'source':<28}{'rows':>9}{'kept':>9}{'dropped':>9}"]
    for source, count in rows.most_common(SOURCES_SHOWN):
        lines.append(f"  {source:<26}{count:>9,}{report.kept.get(source, 0):>9,}{dropped[source]:>9,}")
    if len(rows) > SOURCES_SHOWN:
        lines.append(f"  and {len(rows) - SOURCES_SHOWN} more")
    return lines


def _reason_line(reason: str, sources: dict[str, int]) -> str:
    named = ", ".join(f"{source} {rows:,}" for source, rows in list(sources.items())[:3])
    more = f", {len(sources) - 3} more" if len(sources) > 3 else ""
    return f"  {reason:<26}{sum(sources.values()):>9,}  {named}{more}"


def _extended_line(report: DataReport) -> str:
    extended = report.with_extended_tokens
    if extended is None:
        return "extended tokens: not looked for, as no --extend-vocab-start-token is given"
    share = extended / max(report.counted_prompts, 1)
    return (
        f"extended tokens (ids from {report.extend_vocab_start_token:,} on): in {extended:,} of "
        f"{report.counted_prompts:,} prompts ({share:.1%})"
    )


def _example_lines(number: int, example: Example) -> list[str]:
    text = example.prompt
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        text = f"{text[:HEAD_CHARACTERS]} [...] {text[-TAIL_CHARACTERS:]}"
    lines = text.splitlines()
    if len(lines) > LINES_SHOWN:
        lines = [*lines[: LINES_SHOWN - 3], "[...]", *lines[-2:]]
    answer = " ".join(str(example.ground_truth).split())
    shown = answer if len(answer) <= TAIL_CHARACTERS else f"{answer[:TAIL_CHARACTERS]} [...]"
    place = f"row {example.row} of {Path(example.file).name}"
    title = f"example {number}: {example.source}, {place}, {example.tokens:,} tokens"
    return [title, *(f"  | {line}" for line in lines), f"  = {shown}"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.dataset.onerec_dataset",
        description="What a data set holds and which of its rows a run would drop.",
    )
    parser.add_argument("--files", nargs="+", required=True, help="parquet files, folders or globs")
    parser.add_argument("--tokenizer", required=True, help="the student's tokenizer: folder or hub name")
    parser.add_argument("--extend-vocab-start-token", type=int, help="first extended id; prompts with any are dropped")
    parser.add_argument("--max-prompt-length", type=int, help="longer prompts are dropped; default: none is")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is wrong goes to stderr as one line."""
    args = parse_args(argv)
    try:
        report = read_report(args.files, args.tokenizer, args.extend_vocab_start_token, args.max_prompt_length)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(asdict(report), ensure_ascii=False, default=str))
    else:
        print(render(report))

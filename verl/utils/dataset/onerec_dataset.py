"""Prompts from OneRec's parquet files, and the choice between this layout, verl's and a user's own class.

In: rows with ``messages`` (a chat, the reference answer last where there is one), ``source``, ``uuid`` and ``metadata``. Out: the
items of ``RLHFDataset``: the prompt is everything before the last assistant message, that message's content is the
ground truth, and ``extra_info`` is the row's metadata. Rows of plain text (``segments``) are
dropped.

As a command it prints what the data holds and which rows a run would drop, from a data set as a run would build it::

    python -m verl.utils.dataset.onerec_dataset --files F... --tokenizer T [--extend-vocab-start-token N]
        [--max-prompt-length N] [--prompt-key COLUMN] [--json]
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.console import escape_unknown_characters
from verl.utils.dataset.parquet_files import Files, Row, column_names, expand_data_files
from verl.utils.dataset.prompt_rows import BadRowError, PromptRow, parse_messages, split_answer, text_of
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_extern_type
from verl.utils.tokenizer import hf_tokenizer, render_chat

PERCENTILES = (0, 10, 50, 90, 99, 100)
NEVER_CALLED = {
    "_read_files_and_tokenize": "columns() and read_prompt(row)",
    "_build_messages": "read_prompt(row)",
    "maybe_filter_out_long_prompts": "read_prompt(row), which may raise BadRowError",
}
"""Methods of verl's data set, and what a subclass overrides here in their place."""
EXAMPLE_CHARACTERS = 400
"""Of an example's prompt in the text, half of them from its end."""


class OneRecDataset(RLHFDataset):
    """Prompts from chats in OneRec's layout; arguments and errors as in ``RLHFDataset``."""

    def message_column(self) -> str:
        """OneRec's name for it."""
        return "messages"

    def columns(self) -> set[str]:
        """As in the base class, with OneRec's own columns."""
        return super().columns() | {"segments", "metadata"}

    def read_prompt(self, row: Row) -> PromptRow:
        """Split one chat at its last answer; raises BadRowError where it cannot be used.

        Metadata that are no JSON object are kept as they are: a chat is usable without them.
        """
        try:
            messages = parse_messages(row.get("messages"))
        except BadRowError as bad:
            if bad.reason == "no_messages" and row.get("segments"):
                raise BadRowError("plain_text", "the row holds segments, not a chat") from bad
            raise
        prompt, answer = split_answer(messages)
        metadata = row.get("metadata")
        try:
            known = json.loads(metadata) if isinstance(metadata, str | bytes) else metadata
        except (ValueError, RecursionError):
            known = text_of(metadata)
        if not isinstance(known, dict):
            known = {} if metadata is None else {"metadata": known}
        return PromptRow(prompt, ground_truth=answer, extra_info=known)


def get_dataset_class(data_files: Files, config: DataConfig) -> type[RLHFDataset]:
    """``data.custom_cls`` where it is set; ``RLHFDataset`` for files with the prompt column; else ``OneRecDataset``.

    Raises ValueError where the custom class cannot be loaded, overrides what is never called, or does not extend
    ``RLHFDataset``, whose arguments and ``set_epoch`` the trainer relies on.
    """
    custom = config.custom_cls
    if custom.path is None:
        return RLHFDataset if config.prompt_key in column_names(expand_data_files(data_files)) else OneRecDataset
    if custom.name is None:
        raise ValueError(f"data.custom_cls.path={custom.path!r} needs data.custom_cls.name, the class in it")
    chosen, place = load_extern_type(custom.path, custom.name), f"data.custom_cls.name={custom.name!r} in {custom.path}"
    if not (isinstance(chosen, type) and issubclass(chosen, RLHFDataset)):
        raise ValueError(f"{place} is not a class that extends verl.utils.dataset.rl_dataset.RLHFDataset")
    if unused := [name for name in NEVER_CALLED if hasattr(chosen, name)]:
        fix = f"override {NEVER_CALLED[unused[0]]} (verl.utils.dataset.rl_dataset)"
        raise ValueError(f"{place} overrides {unused[0]}, which nothing calls here: rows stay on disk; {fix}")
    return chosen


def create_rl_dataset(
    data_files: Files, tokenizer: PreTrainedTokenizerBase, config: DataConfig, **options: Any
) -> RLHFDataset:
    """Build the data set of ``get_dataset_class``; arguments and errors as in ``RLHFDataset``.

    Raises ValueError too where a class of the user's own does not take them.
    """
    chosen = get_dataset_class(data_files, config)
    try:
        inspect.signature(chosen).bind(data_files, tokenizer, config, **options)
    except TypeError as error:
        raise ValueError(
            f"data.custom_cls.name={config.custom_cls.name!r} in {config.custom_cls.path}: {error}; write "
            "def __init__(self, data_files, tokenizer, config, **options), and call super().__init__ with all of them"
        ) from error
    return chosen(data_files, tokenizer, config, **options)


def describe(dataset: RLHFDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the data set holds, as JSON can hold it; counts are rows, ``dropped`` is by reason and source."""
    drops, checks, tokens = dataset.drop_report, dataset.checks, dataset.checks["tokens"]
    dropped: dict[str, dict[str, int]] = {}
    for (reason, source), rows in drops.dropped_by_source.most_common():
        dropped.setdefault(reason, {})[source] = rows
    counted = checks.filter(pc.is_valid(tokens))
    lengths = {"kept": tokens.filter(pc.is_null(checks["reason"])), "all": counted["tokens"]}
    percentiles = {}
    for name, column in lengths.items():
        values = np.percentile(column.to_numpy(), PERCENTILES, method="nearest").tolist()
        percentiles[name] = {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}
    examples = []
    for entry in (dataset[place] for place in sorted({0, len(dataset) // 2, len(dataset) - 1})):
        path, row = dataset.location(entry["index"])
        example = {"file": str(path), "row": row, "source": entry["source"], "tokens": tokens[entry["index"]].as_py()}
        prompt = render_chat(tokenizer, entry["raw_prompt"])
        examples.append(example | {"prompt": prompt, "ground_truth": entry["reward_model"]["ground_truth"]})
    return {
        "files": [str(path) for path in dataset.files],
        "rows": drops.rows,
        "kept": dict(drops.kept.most_common()),
        "dropped": dropped,
        "prompt_tokens": percentiles,
        "counted_prompts": len(counted),
        "with_typed_special_tokens": pc.sum(counted["types_special"]).as_py(),
        "with_extended_tokens": pc.sum(pc.greater(counted["extended"], 0)).as_py(),
        "examples": examples,
    }


def render(dataset: RLHFDataset, report: dict[str, Any]) -> str:
    """The report of ``describe`` as text."""
    lines = [dataset.drop_report.summary()]
    for name, values in report["prompt_tokens"].items():
        lines.append(f"prompt tokens, {name}: " + ", ".join(f"{p} {value:,}" for p, value in values.items()))
    extended, counted = report["with_extended_tokens"], report["counted_prompts"]
    share = f"in {extended:,} of {counted:,} prompts" if extended is not None else "not counted without a threshold"
    lines.append(f"extended tokens: {share}")
    lines.append(f"special tokens typed as text: in {report['with_typed_special_tokens']:,} of {counted:,} prompts")
    for example in report["examples"]:
        prompt, half = example["prompt"], EXAMPLE_CHARACTERS // 2
        if len(prompt) > EXAMPLE_CHARACTERS:
            prompt = f"{prompt[:half]} [...] {prompt[-half:]}"
        place = f"row {example['row']} of {Path(example['file']).name}"
        lines += ["", f"{example['source']}, {place}, {example['tokens']:,} tokens", f"  | {prompt!r}"]
        lines.append(f"  = {str(example['ground_truth'])[:half]!r}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; a mistake goes to stderr as one line."""
    escape_unknown_characters()
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.dataset.onerec_dataset",
        description="What a data set holds and which of its rows a run would drop.",
    )
    parser.add_argument("--files", nargs="+", required=True, help="parquet files, folders or globs")
    parser.add_argument("--tokenizer", required=True, help="the student's tokenizer: folder or hub name")
    parser.add_argument("--extend-vocab-start-token", type=int, help="first extended id; prompts with any are dropped")
    parser.add_argument("--max-prompt-length", type=int, default=2**31 - 1, help="longer are dropped; default: none")
    parser.add_argument("--prompt-key", default=DataConfig().prompt_key, help="column of the messages, unless OneRec's")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    args = parser.parse_args(argv)
    start = {"extend_vocab_start_token": args.extend_vocab_start_token}
    try:
        tokenizer = hf_tokenizer(args.tokenizer)
        # The report is wanted most where nearly all rows are dropped.
        limits: dict[str, Any] = {"filter_overlong_prompts": True, "max_dropped_fraction": 1.0}
        config = DataConfig(prompt_key=args.prompt_key, max_prompt_length=args.max_prompt_length, **limits)
        dataset = create_rl_dataset(args.files, tokenizer, config, **start)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = describe(dataset, tokenizer)
    print(json.dumps(report, default=str) if args.json else render(dataset, report))


if __name__ == "__main__":
    main()

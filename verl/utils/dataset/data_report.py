"""What a data set holds, and which of its rows a run would drop, from a data set as a run would build it.

::

    python -m verl.utils.dataset.data_report --files F... --tokenizer T [--extend-vocab-start-token N]
        [--teacher T] [--max-prompt-length N] [--prompt-key COLUMN] [--json]

In: parquet files in OneRec's layout or verl's, and the student's tokenizer. Out: counts of rows by source and by reason
of a drop, lengths of prompts, and a few examples, as text or as JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from verl.config import DataConfig
from verl.utils.console import command_parser, escape_unknown_characters
from verl.utils.tokenizer import hf_tokenizer, render_chat
from verl.utils.vocab_contract import THRESHOLD_HELP, resolve_threshold, threshold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl.utils.dataset.rl_dataset import RLHFDataset

PERCENTILES = (0, 10, 50, 90, 99, 100)
EXAMPLE_CHARACTERS = 400
"""Characters of an example's prompt in the text, half of them from its end."""


def describe(dataset: "RLHFDataset", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
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


def render(dataset: "RLHFDataset", report: dict[str, Any]) -> str:
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
        wanted = example["ground_truth"]
        lines.append("  = (no answer)" if wanted is None else f"  = {str(wanted)[:half]!r}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; a mistake goes to stderr as one line."""
    escape_unknown_characters()
    parser = command_parser(
        "verl.utils.dataset.data_report", "What a data set holds and which of its rows a run would drop."
    )
    parser.add_argument("--files", nargs="+", required=True, help="parquet files, folders or globs")
    parser.add_argument("--tokenizer", required=True, help="the student's tokenizer: folder or hub name")
    start_help = f"{THRESHOLD_HELP}; prompts with extended ids are dropped"
    parser.add_argument("--extend-vocab-start-token", type=threshold, metavar="N", help=start_help)
    parser.add_argument("--teacher", help="the teacher's tokenizer, for --extend-vocab-start-token auto")
    parser.add_argument("--max-prompt-length", type=int, default=2**31 - 1, help="longer are dropped; default: none")
    parser.add_argument("--prompt-key", default=DataConfig().prompt_key, help="column of the messages, unless OneRec's")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    args = parser.parse_args(argv)
    from verl.utils.dataset.onerec_dataset import create_rl_dataset

    try:
        start = resolve_threshold(args.extend_vocab_start_token, args.tokenizer, args.teacher)
        tokenizer = hf_tokenizer(args.tokenizer)
        # The report is wanted most where nearly all rows are dropped.
        limits: dict[str, Any] = {"filter_overlong_prompts": True, "max_dropped_fraction": 1.0}
        config = DataConfig(prompt_key=args.prompt_key, max_prompt_length=args.max_prompt_length, **limits)
        dataset = create_rl_dataset(args.files, tokenizer, config, extend_vocab_start_token=start)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = describe(dataset, tokenizer)
    print(json.dumps(report, default=str) if args.json else render(dataset, report))


if __name__ == "__main__":
    main()

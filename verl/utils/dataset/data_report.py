"""What a data set holds and which of its rows a run would drop, on one page.

In: a data set as a run would build it, so that the report cannot differ from the run. Out: text or JSON: rows kept and
dropped by reason and source, lengths of the prompts, the share with extended tokens, three examples as the model reads
them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

PERCENTILES = (0, 10, 50, 90, 99, 100)
HEAD_CHARACTERS, TAIL_CHARACTERS = 280, 120
"""Of an example's prompt in the text."""


def describe(dataset: RLHFDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the data set holds, as JSON can hold it; counts are rows, ``dropped`` is by reason and source."""
    drops, checks = dataset.drop_report, dataset.checks
    dropped: dict[str, dict[str, int]] = {}
    for (reason, source), rows in drops.dropped_by_source.most_common():
        dropped.setdefault(reason, {})[source] = rows
    counted = checks.filter(pc.is_valid(checks["tokens"]))
    lengths = {"kept": counted["tokens"].filter(pc.is_null(counted["reason"])), "all": counted["tokens"]}
    percentiles = {}
    for name, tokens in lengths.items():
        values = np.percentile(tokens.to_numpy(), PERCENTILES, method="nearest").tolist()
        percentiles[name] = {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, values, strict=True)}
    examples = []
    for entry in (dataset[place] for place in sorted({0, len(dataset) // 2, len(dataset) - 1})):
        path, row = dataset.location(entry["index"])
        example = {"file": str(path), "row": row, "uuid": entry["uuid"], "source": entry["source"]}
        example["tokens"] = checks["tokens"][entry["index"]].as_py()
        prompt = tokenizer.apply_chat_template(entry["raw_prompt"], tokenize=False, add_generation_prompt=True)
        examples.append(example | {"prompt": prompt, "ground_truth": entry["reward_model"]["ground_truth"]})
    return {
        "files": [str(path) for path in dataset.files],
        "rows": drops.rows,
        "kept": dict(drops.kept.most_common()),
        "dropped": dropped,
        "prompt_tokens": percentiles,
        "counted_prompts": len(counted),
        "with_extended_tokens": pc.sum(pc.greater(counted["extended"], 0)).as_py(),
        "examples": examples,
    }


def render(dataset: RLHFDataset, report: dict[str, Any]) -> str:
    """The report of ``describe`` as text."""
    lines = [dataset.drop_report.summary()]
    if dataset.drop_report.dropped_fraction > DataConfig.max_dropped_fraction:
        lines.append(f"  a run stops here unless data.max_dropped_fraction > {DataConfig.max_dropped_fraction}")
    lines += ["", "prompt tokens   " + "".join(f"{f'p{percent}':>8}" for percent in PERCENTILES)]
    for name, values in report["prompt_tokens"].items():
        lines.append(f"  {name:<14}" + "".join(f"{value:>8,}" for value in values.values()))
    extended, counted = report["with_extended_tokens"], report["counted_prompts"]
    if extended is None:
        lines += ["", "extended tokens: not counted, as no --extend-vocab-start-token is given"]
    else:
        lines += ["", f"extended tokens: in {extended:,} of {counted:,} prompts ({extended / counted:.1%})"]
    for number, example in enumerate(report["examples"], 1):
        prompt, answer = example["prompt"], " ".join(str(example["ground_truth"]).split())
        if len(prompt) > HEAD_CHARACTERS + TAIL_CHARACTERS:
            prompt = f"{prompt[:HEAD_CHARACTERS]} [...] {prompt[-TAIL_CHARACTERS:]}"
        place = f"row {example['row']} of {Path(example['file']).name}"
        lines += ["", f"example {number}: {example['source']}, {place}, {example['tokens']:,} tokens"]
        lines += [f"  | {prompt!r}", f"  = {answer[:TAIL_CHARACTERS]}"]
    return "\n".join(lines)

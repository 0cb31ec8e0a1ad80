"""A validation: every held-out prompt is answered, batch by batch, and the batches become one.

In: batches of prompts and a function that answers one. Out: all answers together, and the figures of its stages,
``val_`` put before their family. Not here: what the answers show (``metric_utils``), and how they are made (the
trainer).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from verl.protocol import DataProto

Metrics = dict[str, float]

COUNTS, TIMES = "agent_loop/", "timing_s/"
"""Families: of figures that are counts, unless they are called otherwise, and of those that training alone shows."""


def answer_all(
    loader: Iterable[dict[str, Any]], answer: Callable[[dict[str, Any]], tuple[DataProto, Metrics]]
) -> tuple[DataProto, Metrics]:
    """Answer every prompt.

    Args:
        answer: a batch of answers and the figures of the stages that made it, from rows of the data set.

    Returns:
        The answers, in the order of the data; ``val_agent_loop/*`` and what else stages measured, but for seconds. No
        family below ``val/``, where a source could have its name, and a pattern such as ``val/*/reward`` take it in.
    """
    parts = [answer(rows) for rows in tqdm(loader, desc="validate", unit="batch", leave=False, disable=None)]
    figures = join_figures([(len(batch), measured) for batch, measured in parts])
    measured = {f"val_{name}": value for name, value in figures.items() if not name.startswith(TIMES)}
    return DataProto.concat([batch for batch, _ in parts]), measured


def join_figures(parts: Sequence[tuple[int, Metrics]]) -> Metrics:
    """Figures of batches as those of all their rows.

    The largest of those called ``max``, the smallest of those called ``min``, the sum of counts; of all others the
    mean, weighed by rows. Of a figure that some batches lack it is that of the others.

    Args:
        parts: rows and figures of each batch.
    """
    joined: Metrics = {}
    for name in dict.fromkeys(name for _, figures in parts for name in figures):
        rows = [count for count, figures in parts if name in figures]
        values = [figures[name] for _, figures in parts if name in figures]
        last = name.rsplit("/", 1)[-1]
        if last in ("max", "min"):
            joined[name] = max(values) if last == "max" else min(values)
        elif name.startswith(COUNTS) and last != "mean":
            joined[name] = sum(values)
        else:
            weighed = sum(count * value for count, value in zip(rows, values, strict=True))
            joined[name] = weighed / sum(rows)
    return joined

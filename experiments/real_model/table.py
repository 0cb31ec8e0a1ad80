"""From outcomes to a table: means with standard errors, and what fell short of its goal first.

In: outcomes of `judge` for teacher, student before and student after. Out: rows as dicts, and as Markdown.

A mean is a ratio of two sums over prompts, sum(x) / sum(n). Its standard error is that of the residuals
(x_i - mean n_i) / mean(n), since prompts are drawn and not instructions or tokens; a difference of two models, asked
the same prompts, has that of the differences of their residuals.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from recipe.onpolicy_distill.quickstart.scoreboard import verdict

Pairs = Sequence[Sequence[float]]
TEACHER, BEFORE, AFTER = MODELS = ("teacher", "before", "after")
KINDS = {"regained": TEACHER, "kept": BEFORE, "removed": TEACHER}
"""What a change is called, and whose mean is the goal."""
LABELS = {
    "ifeval_prompt_strict": ("IFEval, prompts, strict", "regained"),
    "ifeval_prompt_loose": ("IFEval, prompts, loose", "regained"),
    "ifeval_instruction_strict": ("IFEval, instructions, strict", "regained"),
    "ifeval_instruction_loose": ("IFEval, instructions, loose", "regained"),
    "reverse_kl": ("Reverse KL to the teacher, nats a token", "removed"),
    "leak": ("General answers with an item token", "removed"),
    "leak_mass": ("Probability of an item token in such an answer", "removed"),
    "recall_1": ("Recall@1", "kept"),
    "recall_5": ("Recall@5", "kept"),
    "recall_10": ("Recall@10", "kept"),
    "recall_20": ("Recall@20", "kept"),
    "free_hit": ("Unconstrained answer is the item", "kept"),
    "free_item": ("Unconstrained answer is an item", "kept"),
    "rec_title": ("Item to title", "kept"),
    "rec_item": ("Title to item", "kept"),
}
"""By metric; ``removed`` is better the smaller it is."""


class Estimate(NamedTuple):
    """A mean, its standard error (None: one prompt), and each prompt's residual."""

    mean: float
    error: float | None
    residuals: list[float]

    @classmethod
    def of(cls, pairs: Pairs) -> "Estimate":
        """Of the outcomes of prompts; one of them at least counts."""
        mean = sum(x for x, _ in pairs) / sum(n for _, n in pairs)
        each = fmean(n for _, n in pairs)
        residuals = [(x - mean * n) / each for x, n in pairs]
        return cls(mean, standard_error(residuals), residuals)


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None where one value has no spread."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def compare(outcomes: Mapping[str, Mapping[str, Pairs]]) -> list[dict[str, Any]]:
    """One row per metric that the student has: means and errors by model, and ``short``, by how much after falls short
    of the goal, with ``short_error``; the largest shortfall in standard errors first.
    """
    rows = []
    for metric, (label, kind) in LABELS.items():
        found = {model: pairs[metric] for model, pairs in outcomes.items() if metric in pairs}
        estimates = {model: Estimate.of(pairs) for model, pairs in found.items() if any(n for _, n in pairs)}
        goal, after = estimates.get(KINDS[kind]), estimates.get(AFTER)
        if goal is None or after is None:
            continue
        sign = -1 if kind == "removed" else 1
        short = sign * (goal.mean - after.mean)
        error = standard_error([a - b for a, b in zip(goal.residuals, after.residuals, strict=True)])
        means = {model: estimate.mean for model, estimate in estimates.items()}
        row: dict[str, Any] = {"metric": metric, "label": label, "prompts": len(found[AFTER]), "mean": means}
        row |= {"error": {model: estimate.error for model, estimate in estimates.items()}}
        row |= {"change": verdict(kind, *(means.get(model) for model in MODELS)), "short": short, "short_error": error}
        rows.append(row)
    return sorted(rows, key=lambda row: -_errors_short(row))


def _errors_short(row: Mapping[str, Any]) -> float:
    short, error = row["short"], row["short_error"]
    return short / error if error else math.copysign(math.inf, short) if short else 0.0


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table; a difference is paired, prompt by prompt."""
    head = ["", "prompts", *MODELS, "", "short of its goal by"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [_shown(row["mean"].get(model), row["error"].get(model)) for model in MODELS]
        short = _shown(row["short"], row["short_error"])
        lines.append([row["label"], str(row["prompts"]), *cells, row["change"], short])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(mean: float | None, error: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")

"""From answers and rankings to metrics. Pure Python, no model.

In:  answers beside what was asked for. Out: shares between 0 and 1 by name. A mean over nothing is left out.
"""

import re
from collections.abc import Container, Sequence, Set
from dataclasses import dataclass
from statistics import fmean

from recipe.onpolicy_distill.scoreboard.items import listed_items
from verl.utils.dataset.items import Item

KS = (1, 5, 10)
"""Lengths of recommendation lists that are measured."""

# The opening tag may stand in the prompt, so the closing one alone decides; a thought that never ends goes to the end.
_THOUGHTS = re.compile(r"^.*?</think>|<think>(?!.*</think>).*", re.DOTALL)


@dataclass(frozen=True)
class Answered:
    """One answer beside its question."""

    source: str
    text: str
    """The answer as text; item tokens are in it."""
    wanted: str


def final_answer(text: str) -> str:
    """A text without the thoughts before it, or one that never ends, and without blanks around it."""
    return _THOUGHTS.sub("", text).strip()


def is_exact(answered: Answered) -> bool:
    """Whether the answer is, but for thoughts and outer blanks, the one that was wanted."""
    return final_answer(answered.text) == final_answer(answered.wanted)


def accuracy_metrics(prefix: str, answers: Sequence[Answered]) -> dict[str, float | dict[str, float]]:
    """``<prefix>accuracy``, the share of exact answers, and ``<prefix>accuracy_by_task``, that of each source.

    Questions whose answer is unknown do not count.
    """
    answers = [answered for answered in answers if final_answer(answered.wanted)]
    if not answers:
        return {}
    by_task: dict[str, list[bool]] = {}
    for answered in answers:
        by_task.setdefault(answered.source, []).append(is_exact(answered))
    return {
        f"{prefix}accuracy": fmean(map(is_exact, answers)),
        f"{prefix}accuracy_by_task": {task: fmean(exact) for task, exact in sorted(by_task.items())},
    }


def recall_at(ranking: Sequence[Item], targets: Set[Item], k: int) -> float:
    """Share of the targets that are among the first ``k`` of the ranking."""
    return len(targets & set(ranking[:k])) / len(targets)


def ranking_metrics(rankings: Sequence[Sequence[Item]], targets: Sequence[Set[Item]]) -> dict[str, float]:
    """How good lists of items are, over prompts.

    - ``rec_recall_at_{1,10}``, and ``rec_recall`` for Recall@5: mean share of a prompt's targets in the first k.
    - ``rec_pass_at_{1,5,10}``: share of prompts with at least one target in the first k.

    Popularity is measured with the same list for every prompt.
    """
    if not rankings:
        return {}
    pairs = list(zip(rankings, targets, strict=True))
    metrics = {}
    for k in KS:
        recalls = [recall_at(ranking, wanted, k) for ranking, wanted in pairs]
        metrics["rec_recall" if k == 5 else f"rec_recall_at_{k}"] = fmean(recalls)
        metrics[f"rec_pass_at_{k}"] = fmean(recall > 0 for recall in recalls)
    return metrics


def recall_by_task(
    rankings: Sequence[Sequence[Item]], targets: Sequence[Set[Item]], sources: Sequence[str]
) -> dict[str, float]:
    """Mean Recall@5 over the prompts of each source, by source."""
    recalls: dict[str, list[float]] = {}
    for ranking, wanted, source in zip(rankings, targets, sources, strict=True):
        recalls.setdefault(source, []).append(recall_at(ranking, wanted, 5))
    return {source: fmean(values) for source, values in sorted(recalls.items())}


def free_metrics(answers: Sequence[str], targets: Sequence[Set[Item]], catalogue: Container[Item]) -> dict[str, float]:
    """How often unconstrained answers to recommendation prompts name an item.

    - ``free_rate``: share of answers that are items and nothing else, the first of them a target.
    - ``free_valid_rate``: share of answers that are items and nothing else, the first of them in the catalogue.
    """
    if not answers:
        return {}
    firsts = [next(iter(listed_items(final_answer(answer))), None) for answer in answers]
    return {
        "free_rate": fmean(first in wanted for first, wanted in zip(firsts, targets, strict=True)),
        "free_valid_rate": fmean(first in catalogue for first in firsts),
    }


def one_of_each_in_turn(sources: Sequence[str]) -> list[int]:
    """Row numbers such that the sources alternate: each one's first row, then each one's second, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for row, source in enumerate(sources):
        seen[source] = seen.get(source, 0) + 1
        turns.append((seen[source], source, row))
    return [row for _, _, row in sorted(turns)]

"""Metrics of validation: those of its rewards, and those of its batches as of one.

In:  all answers as a batch, metrics of each batch. Out: flat dicts of floats.
Not here: the reverse KL on held-out prompts (``metric_utils``), and what answers and scores (``ray_trainer``).
"""

from collections.abc import Sequence

import numpy as np

from verl.protocol import DataProto
from verl.trainer.ppo.metric_utils import Metrics, as_number, overall_and_per_source, reported_means, rows_by_source

RESAMPLES, SEED = 1000, 42
"""verl's, so that the same answers have the same numbers in both."""


def compute_validation_reward_metrics(batch: DataProto) -> Metrics:
    """Metrics of the rewards of all answers.

    - ``val/reward``, ``val/<source>/reward``: mean of their summed ``token_level_scores``.
    - ``val_reward_extra/<key>``, ``val_reward_extra/<source>/<key>``: see `metric_utils.reported_means`.
    - ``val-core/<source>/<acc or reward>/<name>``: see `answers_metrics`, means over the source's prompts. ``acc``
      where the reward function returned one for every answer of the source.
    """
    metrics = overall_and_per_source("val", batch, lambda rows: {"reward": _rewards(rows).mean().item()})
    metrics |= overall_and_per_source("val_reward_extra", batch, reported_means)
    for source, places in rows_by_source(batch).items():
        rows = batch[places]
        reported = rows.array("reward_extra")
        found = [as_number(extra.get("acc")) for extra in reported]
        name, values = ("reward", _rewards(rows)) if None in found else ("acc", np.array(found))
        has_votes = all("pred" in extra for extra in reported)
        votes = np.array([str(extra["pred"]) for extra in reported]) if has_votes else None
        _, prompts, counts = np.unique(rows.array("uid").astype(str), return_inverse=True, return_counts=True)
        groups = np.split(prompts.argsort(kind="stable"), counts.cumsum()[:-1])
        measured = [(1, answers_metrics(values[own], None if votes is None else votes[own])) for own in groups]
        metrics |= {f"val-core/{source}/{name}/{key}": value for key, value in join_metrics(measured).items()}
    return metrics


def _rewards(batch: DataProto) -> np.ndarray:
    return batch.tensor("token_level_scores").sum(dim=-1).numpy()


def answers_metrics(values: np.ndarray, votes: np.ndarray | None = None) -> Metrics:
    """Metrics of the N answers to one prompt, under verl's names.

    - ``mean@N``: the mean of their values.
    - ``best@N/mean``: the best of N answers, drawn from them with replacement; mean over the draws.
    - ``maj@N/mean``: the value of the answer that most of N so drawn agree with; likewise.

    Args:
        values: (N,).
        votes: (N,) what each answers; None: no ``maj@N``.
    """
    n = len(values)
    metrics = {f"mean@{n}": float(values.mean())}
    if n > 1:
        draws = np.random.RandomState(SEED).randint(n, size=(RESAMPLES, n))
        metrics[f"best@{n}/mean"] = float(values[draws].max(axis=1).mean())
        if votes is not None:
            drawn = votes[draws]
            agreeing = (drawn[:, :, None] == drawn[:, None, :]).sum(axis=-1)
            # argmax gives the first of several: among votes with as many, the one that was drawn first wins.
            winners = draws[np.arange(RESAMPLES), agreeing.argmax(axis=1)]
            metrics[f"maj@{n}/mean"] = float(values[winners].mean())
    return metrics


def join_metrics(parts: Sequence[tuple[int, Metrics]]) -> Metrics:
    """Metrics of batches as those of all their rows.

    Names that end in ``max`` or ``min`` keep the extreme, ``agent_loop/*`` counts are added up, all others are means
    weighted by rows. A batch that lacks a metric does not count for it.

    Args:
        parts: rows and metrics of each batch.
    """
    joined: Metrics = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        rows, values = zip(*((count, metrics[name]) for count, metrics in parts if name in metrics), strict=True)
        last = name.rsplit("/", 1)[-1]
        if last in ("max", "min"):
            joined[name] = max(values) if last == "max" else min(values)
        elif name.startswith("agent_loop/") and last != "mean":
            joined[name] = sum(values)
        else:
            joined[name] = sum(count * value for count, value in zip(rows, values, strict=True)) / sum(rows)
    return joined

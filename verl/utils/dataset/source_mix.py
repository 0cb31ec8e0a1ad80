"""An order of rows in which every stretch holds each group of sources in its share.

In: the source of each row, shares by pattern, a random generator. Out: places of rows, as many as there are rows. Rows
of a group whose share is larger than it has rows come again, in another order, after all of them have come; of a group
whose share is smaller, an epoch holds a part.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np


def group_by_weight(sources: Sequence[str], weights: Mapping[str, float]) -> list[tuple[float, np.ndarray]]:
    """Share and places of each group: the rows whose source a pattern is the first to match.

    Args:
        weights: all above 0, which ``DataConfig`` sees to.

    Raises:
        ValueError: a source that no pattern matches, or a pattern that matches none.
    """
    key = "data.source_weights"
    chosen = {
        source: next((place for place, pattern in enumerate(weights) if fnmatchcase(source, pattern)), None)
        for source in sorted(set(sources))
    }
    unmatched = [source for source, place in chosen.items() if place is None]
    if unmatched:
        raise ValueError(f"{key}={dict(weights)} matches no source {unmatched}; give each a weight, or a pattern '*'")
    group_of = np.array([chosen[source] for source in sources])
    groups = [np.flatnonzero(group_of == place) for place in range(len(weights))]
    empty = [pattern for pattern, places in zip(weights, groups, strict=True) if not len(places)]
    if empty:
        raise ValueError(f"{key}: no usable row has a source like {empty}; the sources are {sorted(chosen)}")
    total = sum(weights.values())
    return [(weight / total, places) for weight, places in zip(weights.values(), groups, strict=True)]


def mixed_order(groups: Sequence[tuple[float, np.ndarray]], random: np.random.Generator, shuffle: bool) -> list[int]:
    """Places of rows such that among the first n each group has its share of n, to within one row."""
    length = sum(len(places) for _, places in groups)
    shares = np.array([share for share, _ in groups])
    turns = np.empty(length, dtype=np.int64)
    had = np.zeros(len(groups))
    # Each turn goes to the group that is furthest behind its share.
    for place in range(length):
        turns[place] = group = int(np.argmax(shares * (place + 1) - had))
        had[group] += 1
    order = np.empty(length, dtype=np.int64)
    for group, (_, places) in enumerate(groups):
        wanted = np.flatnonzero(turns == group)
        # A group starts again only after all of it has come, each pass in an order of its own.
        passes = -(-len(wanted) // len(places))
        drawn = [random.permutation(places) if shuffle else places for _ in range(passes)]
        order[wanted] = np.concatenate(drawn)[: len(wanted)] if passes else []
    return order.tolist()

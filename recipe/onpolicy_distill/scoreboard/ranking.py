"""The k most likely items after a prompt, by asking the engine for single tokens.

In:  a prompt that ends where an item's first code is due, the trie of items, and an engine as a function that gives the
most likely of some allowed tokens, with their log-probs AMONG THEM. Out: k items with their log-probs, best first. The
distribution is the model's, renormalised at each level over the codes that continue some item of the catalogue: nothing
outside of it is ever generated.

Best-first search over two kinds of nodes, each with a bound: no item below it is likelier.

    path    codes chosen so far; bound: the path's probability
    rest    the allowed codes after a path that were not looked at yet; bound: what the path has left after those that
            were, and the least of those, for a code whose probability was not asked is no likelier than one whose was

The node of the largest bound is taken from the heap. A whole path is the next best item, a shorter one is exchanged for
the rest of all its continuations, and a rest costs one request: its best codes (20 at most) leave it and become paths
of their own. No bound is larger than that of the node it came from, so items come out in order, and no request is made
that the order does not need.

Requests per prompt for k = 10 and 8 codes a level: one for each path that is opened, measured 16. With 3 x 8,192
codes and a model that spreads its bets it would be hundreds, so at most ``width`` paths of each length are looked at,
and a ranking that this cut short is marked as not exact. A code that is the only one allowed costs no request, the
prompt itself is in the engine's prefix cache, and a request carries its allowed ids (up to 8,192 at the first level,
mostly few below it).

Precision: what is left of a path is 1 - sum(p) in the engine's float32. Where that is less than about 1e-7, what the
rest holds is not known: a ranking that needs it is marked as not exact.
"""

import heapq
import itertools
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from recipe.onpolicy_distill.scoreboard.items import ItemTrie
from verl.utils.dataset.items import Item

BestTokens = Callable[[list[int], tuple[int, ...]], Awaitable[list[tuple[int, float]]]]
"""``(token_ids, allowed) -> [(token, log_prob), ...]``: the most likely next tokens among ``allowed``, best first, and
their log-probs under the softmax over ``allowed`` alone; as many as the engine gives, one at least."""

RESOLUTION = 2.0**-24
"""Smallest share of a path's probability that float32 log-probs near 0 can express."""

WIDTH = 128
"""Paths of each length that are looked at."""


class _Node(NamedTuple):
    """A path, and where ``rest`` is not None the continuations of it that are still to be looked at."""

    path: tuple[int, ...]
    log_prob: float
    """Of the path, or of all of the rest together."""
    rest: tuple[int, ...] | None = None
    is_vague: bool = False
    """Whether the rest holds less than float32 resolves."""


class Ranking(NamedTuple):
    """The most likely items, best first."""

    items: list[tuple[Item, float]]
    """Each with the natural log of its probability."""
    exact: bool
    """Whether nothing was left unseen that might have been likelier."""


async def most_likely_items(
    prompt: list[int], trie: ItemTrie, k: int, best_tokens: BestTokens, width: int = WIDTH
) -> Ranking:
    """The ``k`` most likely items, or all of a smaller catalogue.

    Args:
        prompt: token ids up to and including the one that opens an item.
        trie: the catalogue.
        k: how many.
        best_tokens: the engine.
        width: most paths of each length that are looked at, at least ``k``.
    """
    order = itertools.count()  # equal nodes come out in the order they went in, and are never compared
    heap: list[tuple[float, int, _Node]] = [(0.0, next(order), _Node((), 0.0, trie.allowed_after(())))]
    found: list[tuple[Item, float]] = []
    seen = [0] * (trie.depth + 1)
    exact = True

    def push(bound: float, node: _Node) -> None:
        heapq.heappush(heap, (-bound, next(order), node))

    while heap and len(found) < k:
        negative, _, (path, log_prob, rest, is_vague) = heapq.heappop(heap)
        bound = -negative
        if rest is None and len(path) == trie.depth:
            found.append((trie.item_of(path), log_prob))
        elif rest is None:
            push(bound, _Node(path, log_prob, trie.allowed_after(path)))
        elif seen[len(path) + 1] >= max(width, k):
            exact = False
        else:
            best = [(rest[0], 0.0)] if len(rest) == 1 else await best_tokens([*prompt, *path], rest)
            seen[len(path) + 1] += len(best)
            exact = exact and not is_vague
            for token, share in best:
                of_path = min(log_prob + share, bound)
                push(of_path, _Node((*path, token), of_path))
            pushed = {token for token, _ in best}
            others = tuple(other for other in rest if other not in pushed)
            if others:
                left = 1.0 - math.fsum(math.exp(share) for _, share in best)
                of_rest = log_prob + math.log(max(left, RESOLUTION))
                push(min(of_rest, log_prob + best[-1][1], bound), _Node(path, of_rest, others, left < RESOLUTION))
    return Ranking(found, exact)

"""A catalogue of items with three-level ids, and users whose tastes decide what they look at next.

In: sizes and a random generator. Out: items (codes, text, caption), and histories that can be predicted, though not
with certainty. Chats, tokens and files come later.

An item belongs to one of the tastes; its first code is the taste's, so that near items have near ids. A user has two
tastes, which no file holds. After each item comes, with FIRST_SHARE, the item that mostly follows it, with
SECOND_SHARE one that sometimes follows it, and else any item of the user's tastes, a few being far more liked.
"""

from dataclasses import dataclass
from random import Random

from recipe.onpolicy_distill.quickstart.general_tasks import LETTERS
from verl.utils.dataset.items import ITEM_BEGIN, ITEM_END, code_token, item_tokens

FIRST_SHARE, SECOND_SHARE = 0.55, 0.25


@dataclass(frozen=True)
class Item:
    """One item of the catalogue."""

    taste: int
    """The taste it belongs to."""
    codes: tuple[int, int, int]
    """Its id, coarse to fine."""
    caption: str
    """Three letters: two of its taste, one of its own."""

    @property
    def text(self) -> str:
        """The id as models read and write it, such as ``<|sid_begin|><s_a_3><s_b_7><s_c_1><|sid_end|>``."""
        return "".join(item_tokens(self.codes))


def all_item_tokens(codes_per_level: int) -> list[str]:
    """The tokens of all items, which a student has and its teacher lacks."""
    return [ITEM_BEGIN, ITEM_END, *(code_token(level, code) for level in range(3) for code in range(codes_per_level))]


class Catalogue:
    """The items, and what follows what.

    Args:
        items: how many; a multiple of ``tastes``.
        tastes: how many groups the items fall into, at most ``codes_per_level``.
        codes_per_level: codes at each of the three levels of an id.
        random: draws ids, captions and successors.
    """

    def __init__(self, items: int, tastes: int, codes_per_level: int, random: Random) -> None:
        self.items: list[Item] = []
        for taste, code in enumerate(random.sample(range(codes_per_level), tastes)):
            prefix = LETTERS[taste % len(LETTERS)] + random.choice(LETTERS)
            for number in random.sample(range(codes_per_level**2), items // tastes):
                codes = (code, *divmod(number, codes_per_level))
                self.items.append(Item(taste, codes, prefix + random.choice(LETTERS)))
        self._by_taste = [[i for i, item in enumerate(self.items) if item.taste == taste] for taste in range(tastes)]
        self._liking = [1 / (rank + 1) for rank in range(items // tastes)]
        self._mostly_next = {item: after for group in self._by_taste for item, after in _ring(group, random)}
        self._sometimes_next = dict(_ring(list(range(items)), random))

    def draw_history(self, length: int, random: Random) -> list[int]:
        """What a new user looked at, in order: ``length`` item numbers."""
        tastes = random.sample(range(len(self._by_taste)), k=2)
        history = [self._draw_liked(tastes, random)]
        while len(history) < length:
            history.append(self._draw_next(history[-1], tastes, random))
        return history

    def _draw_next(self, last: int, tastes: list[int], random: Random) -> int:
        chance = random.random()
        if chance < FIRST_SHARE:
            return self._mostly_next[last]
        if chance < FIRST_SHARE + SECOND_SHARE:
            return self._sometimes_next[last]
        return self._draw_liked(tastes, random)

    def _draw_liked(self, tastes: list[int], random: Random) -> int:
        return random.choices(self._by_taste[random.choice(tastes)], self._liking)[0]


def _ring(items: list[int], random: Random) -> list[tuple[int, int]]:
    """Pairs of an item and the one after it on a ring through all of ``items``."""
    order = random.sample(items, len(items))
    return list(zip(order, order[1:] + order[:1], strict=True))

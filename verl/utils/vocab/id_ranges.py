"""Sets of ids as ranges: what a person reads and what a JSON file holds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class IdRange(NamedTuple):
    """Ids ``first`` to ``last``, both of them included."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def to_ranges(ids: Iterable[int]) -> tuple[IdRange, ...]:
    """The fewest ranges that hold exactly ``ids``, in order."""
    ranges: list[IdRange] = []
    for token_id in sorted(ids):
        if ranges and token_id == ranges[-1].last + 1:
            ranges[-1] = IdRange(ranges[-1].first, token_id)
        else:
            ranges.append(IdRange(token_id, token_id))
    return tuple(ranges)


def count_ids(ranges: Sequence[IdRange]) -> int:
    """Number of ids in ``ranges``."""
    return sum(part.size for part in ranges)


def show_ranges(ranges: Sequence[IdRange], most: int = 3) -> str:
    """``5-7, 9``; beyond ``most`` ranges the rest is counted."""
    shown = ", ".join(str(part) for part in ranges[:most])
    return f"{shown} and {len(ranges) - most} more ranges" if len(ranges) > most else shown

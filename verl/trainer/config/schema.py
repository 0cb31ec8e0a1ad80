"""The keys that exist, read from the dataclasses, and the answer to a key that does not."""

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from verl.trainer.config.config import PPOConfig


@dataclass(frozen=True)
class KeySchema:
    """Dotted keys of a configuration."""

    leaves: frozenset[str]
    """Keys that hold a value."""
    sections: frozenset[str]
    """Keys that hold further keys, all of them known."""
    open_maps: frozenset[str]
    """Keys that hold further keys of the user's choice; also among ``leaves``."""

    def knows(self, key: str) -> bool:
        """Whether ``key`` is a value or a section."""
        return key in self.leaves or key in self.sections

    def is_open(self, key: str) -> bool:
        """Whether ``key`` is an open map or lies in one."""
        return any(key == name or key.startswith(name + ".") for name in self.open_maps)


@functools.cache
def key_schema() -> KeySchema:
    """All keys of ``PPOConfig``."""
    leaves: set[str] = set()
    sections: set[str] = set()
    open_maps: set[str] = set()

    def walk(config_class: Any, prefix: str) -> None:
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            key, hint = f"{prefix}{field.name}", hints[field.name]
            if dataclasses.is_dataclass(hint):
                sections.add(key)
                walk(hint, f"{key}.")
                continue
            leaves.add(key)
            if get_origin(hint) is dict:
                open_maps.add(key)

    walk(PPOConfig, "")
    return KeySchema(frozenset(leaves), frozenset(sections), frozenset(open_maps))


def nearest_keys(key: str, count: int = 3) -> list[str]:
    """Up to ``count`` known keys a user may have meant: first the same last name elsewhere, then similar spellings."""
    known = sorted(key_schema().leaves)
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    by_closeness = sorted(same_name, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio(), reverse=True)
    similar = difflib.get_close_matches(key, known, n=count, cutoff=0.6)
    return list(dict.fromkeys([*by_closeness, *similar]))[:count]


def unknown_key_message(key: str) -> str:
    """What to tell about a key that does not exist."""
    nearest = nearest_keys(key)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys"
    return f"{key} is no known key; {hint}"

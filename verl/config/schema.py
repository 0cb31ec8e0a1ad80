"""The keys that exist, read from the dataclasses, and the answer to a key or a value that does not fit them."""

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from verl.config.ppo import PPOConfig


@dataclass(frozen=True)
class KeySchema:
    """Dotted keys of a configuration."""

    leaves: frozenset[str]
    """Keys that hold a value."""
    lists: frozenset[str]
    """Keys that hold a list; also among ``leaves``."""
    sections: frozenset[str]
    """Keys that hold further keys, all of them known."""
    open_maps: frozenset[str]
    """Keys that hold further keys of the user's choice; also among ``leaves``."""
    entry_keys: Mapping[str, tuple[str, ...]]
    """Open maps whose entries are sections, such as ``algorithm.distill.teachers``: the keys of an entry."""

    def knows(self, key: str) -> bool:
        """Whether ``key`` is a value or a section."""
        return key in self.leaves or key in self.sections

    def is_open(self, key: str) -> bool:
        """Whether ``key`` is an open map or may lie in one."""
        if (place := self.split_entry(key)) is not None:
            return not place[2] or place[2] in self.entry_keys[place[0]]
        return self.map_of(key) != ""

    def map_of(self, key: str) -> str:
        """The open map that ``key`` is, or lies in; empty: none."""
        return next((name for name in self.open_maps if key == name or key.startswith(name + ".")), "")

    def split_entry(self, key: str) -> tuple[str, str, str] | None:
        """Map, entry and key within the entry (empty: the entry itself) of a key in a map of sections, else None."""
        for name in self.entry_keys:
            if key.startswith(name + "."):
                entry, _, rest = key.removeprefix(name + ".").partition(".")
                return name, entry, rest
        return None

    def holds_keys(self, key: str) -> bool:
        """Whether a mapping stands at ``key``."""
        place = self.split_entry(key)
        return key in self.sections or key in self.open_maps or (place is not None and not place[2])

    def example_below(self, key: str) -> str:
        """A key that lies below one that holds keys."""
        if key in self.entry_keys:
            return f"{key}.NAME.{self.entry_keys[key][0]}"
        if (place := self.split_entry(key)) is not None:
            return f"{key}.{self.entry_keys[place[0]][0]}"
        return min((leaf for leaf in self.leaves if leaf.startswith(key + ".")), default=f"{key}.NAME")


@functools.cache
def key_schema() -> KeySchema:
    """All keys of ``PPOConfig``."""
    leaves: set[str] = set()
    lists: set[str] = set()
    sections: set[str] = set()
    open_maps: set[str] = set()
    entry_keys: dict[str, tuple[str, ...]] = {}

    def walk(config_class: Any, prefix: str) -> None:
        hints = get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            key, hint = f"{prefix}{field.name}", hints[field.name]
            if dataclasses.is_dataclass(hint):
                sections.add(key)
                walk(hint, f"{key}.")
                continue
            leaves.add(key)
            if any(get_origin(option) is list for option in _options(hint)):
                lists.add(key)
            if get_origin(hint) is dict:
                open_maps.add(key)
                entry = get_args(hint)[1]
                if dataclasses.is_dataclass(entry):
                    entry_keys[key] = tuple(field.name for field in dataclasses.fields(entry))

    walk(PPOConfig, "")
    return KeySchema(frozenset(leaves), frozenset(lists), frozenset(sections), frozenset(open_maps), entry_keys)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


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
    if (place := key_schema().split_entry(key)) is not None:
        return _unknown_in_entry(key, *place)
    nearest = nearest_keys(key)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys"
    return f"{key} is no known key; {hint}"


def _unknown_in_entry(key: str, open_map: str, entry: str, name: str) -> str:
    known = key_schema().entry_keys[open_map]
    nearest = [name.split(".")[0]] if name.split(".")[0] in known else difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"{key} is no known key; did you mean {open_map}.{entry}.{nearest[0]}?"
    return f"{key} is no known key; those of an entry of {open_map} are {', '.join(known)}"


def shape_errors(key: str, value: Any) -> Iterator[str]:
    """What to tell about lists, mappings and plain values that stand in each other's place, at any depth.

    To be asked before a value is laid over another, which fails between a list and a mapping.
    """
    schema = key_schema()
    if isinstance(value, str) and value.startswith("${"):
        return
    if isinstance(value, Mapping):
        if key in schema.lists:
            yield no_list_message(key, value)
        elif schema.holds_keys(key):
            for name, item in value.items():
                yield from shape_errors(f"{key}.{name}", item)
    elif schema.holds_keys(key) and not (value is None and key in schema.open_maps):
        yield no_section_message(key, value)


def no_section_message(key: str, value: Any) -> str:
    """What to tell about something else than a mapping where keys lie below ``key``."""
    return f"{key}={value!r} must be a section with keys below it, such as {key_schema().example_below(key)}"


def no_list_message(key: str, value: Any) -> str:
    """What to tell about something else than a list where one belongs."""
    return f"{key}={value!r} must be a list, such as [a,b]"

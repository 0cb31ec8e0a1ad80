"""The keys of a configuration, read from its dataclasses, and the messages about keys and values that do not fit them.

Every function takes the ``root`` dataclass that keys start from.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

EXPECTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be True or False",
    "string_type": "must be a text",
    "list_type": "must be a list, such as [a,b]",
    "tuple_type": "must be a list of two",
    "missing": "must be a list of two",
    "too_long": "must be a list of two",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "is not one of {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
}
"""The message for each of pydantic's types of error; any other keeps pydantic's own."""


def type_at(root: Any, key: str) -> Any:
    """The declared type of what is at a dotted key; None where no such key can exist.

    In a map of the user's own keys every key exists; where the entries are sections, their keys are known again.
    """
    hint = root
    for name in key.split("."):
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            return None
    return hint


def map_of(root: Any, key: str) -> str | None:
    """The map of the user's own keys that ``key`` is, or is in."""
    parts = key.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in paths if get_origin(type_at(root, path)) is dict), None)


def all_keys(root: Any) -> list[str]:
    """Every key that holds a value; a map of the user's own keys is one."""
    keys: list[str] = []
    for name, hint in get_type_hints(root).items():
        keys += [f"{name}.{key}" for key in all_keys(hint)] if dataclasses.is_dataclass(hint) else [name]
    return keys


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _has_keys(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or get_origin(hint) is dict


def nearest_keys(root: Any, key: str, count: int = 3) -> list[str]:
    """Up to ``count`` known keys a user may have meant: first the same last name elsewhere, then similar spellings."""
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in all_keys(root) if name.rsplit(".", 1)[-1] == last]
    by_closeness = sorted(same_name, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio(), reverse=True)
    similar = difflib.get_close_matches(key, sorted(all_keys(root)), n=count, cutoff=0.6)
    return list(dict.fromkeys([*by_closeness, *similar]))[:count]


def unknown_key_message(root: Any, key: str) -> str:
    """The error for a key that does not exist, with the nearest known ones."""
    open_map = map_of(root, key)
    section = None if open_map is None else get_args(type_at(root, open_map))[1]
    if open_map is None or not dataclasses.is_dataclass(section):
        nearest = nearest_keys(root, key)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys"
        return f"{key} is no known key; {hint}"
    entry, name, *below = key.removeprefix(f"{open_map}.").split(".")
    known = list(get_type_hints(section))
    similar = [name] if below and name in known else difflib.get_close_matches(name, known, n=1)
    if similar:
        return f"{key} is no known key; did you mean {open_map}.{entry}.{similar[0]}?"
    return f"{key} is no known key; those of an entry of {open_map} are {', '.join(known)}"


def shape_errors(root: Any, key: str, value: Any) -> Iterator[str]:
    """Errors for lists, mappings and plain values in each other's place, at any depth.

    For the command line: laying a list over a mapping fails in OmegaConf, which names no key.
    """
    hint = type_at(root, key)
    if isinstance(value, str) and value.startswith("${"):
        return
    if isinstance(value, Mapping) and _has_keys(hint):
        for name, item in value.items():
            yield from shape_errors(root, f"{key}.{name}", item)
    elif isinstance(value, Mapping) and any(get_origin(option) is list for option in _options(hint)):
        yield f"{key}={value!r} {EXPECTED['list_type']}"
    elif _has_keys(hint) and not isinstance(value, Mapping) and not (value is None and get_origin(hint) is dict):
        yield _section_message(root, key, value)


def _section_message(root: Any, key: str, value: Any) -> str:
    hint, below = type_at(root, key), key
    if get_origin(hint) is dict:
        hint, below = get_args(hint)[1], f"{key}.NAME"
    if dataclasses.is_dataclass(hint):
        below += f".{all_keys(hint)[0]}"
    return f"{key}={value!r} must be a section with keys below it, such as {below}"


def error_messages(root: Any, error: ValidationError, prefix: str = "") -> list[str]:
    """What is wrong with a ``root``, with key, value and what to set instead; ``prefix``: of its keys."""
    return list(dict.fromkeys(_message(root, found, prefix) for found in error.errors()))


def _message(root: Any, error: Any, prefix: str) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    hint, items = type_at(root, key), [f"[{part}]" for part in error["loc"] if isinstance(part, int)]
    if kind == "value_error":  # a check of a whole section, whose text names its keys
        return str(context["error"])
    if kind == "unexpected_keyword_argument":
        return unknown_key_message(root, key)
    if kind in ("dataclass_type", "dict_type"):
        return prefix + _section_message(root, key, value)
    if kind == "literal_error":
        context = {"expected": context["expected"].replace("'", "").replace(" or ", ", ")}
    # Of a tuple that is too short pydantic gives the index of the missing item; the tuple itself is of more use.
    place = key if kind == "missing" else key + "".join(items)
    text = EXPECTED[kind].format(**context) if kind in EXPECTED else error["msg"]
    null = ", or null" if type(None) in _options(hint) and "null" not in text else ""
    return f"{prefix}{place}={value!r} {text}{null}"

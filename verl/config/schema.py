"""Sections of a configuration: how one is made, which keys it has, and the messages about what does not fit.

pydantic checks the fields. A text counts as what it spells, for ``${oc.env:N}`` gives texts, and a number as a text.
Functions about keys take the ``root`` dataclass that keys start from.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

Section = TypeVar("Section")


def _listed(value: Any) -> Any:
    """The list that a text stands for: its only item, or one that kept the quotes of its shell line ('[a,b]')."""
    if not isinstance(value, str):
        return value
    items = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    return [item.strip(" '\"") for item in items if item.strip()]


Count = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A leading ``~`` is the user's home, which a shell does not put there behind ``KEY=``."""

IsListed = BeforeValidator(_listed)
Texts = Annotated[list[str], IsListed]
TextsOrNull = Annotated[Texts, BeforeValidator(lambda value: [] if value is None else value)]
"""null: none."""

NullIsEmpty = BeforeValidator(lambda value: {} if value is None else value)
Options = Annotated[dict[str, Any], NullIsEmpty]
"""Keys of the user's choice; null: none."""


@dataclass_transform(field_specifiers=(dataclasses.field, Field))
def section(key: str = "", kw_only: bool = False) -> Callable[[type[Section]], type[Section]]:
    """Make a class a dataclass that checks its fields, and names ``key`` in the errors of one that is built in code."""

    def as_dataclass(cls: type[Section]) -> type[Section]:
        checked: Any = dataclass(cls, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True), kw_only=kw_only)
        # pydantic builds sections inside a section without __init__, so only the outermost one reports.
        init = checked.__init__

        @functools.wraps(init)
        def named_init(self: Any, *arguments: Any, **settings: Any) -> None:
            try:
                init(self, *arguments, **settings)
            except ValidationError as error:
                raise ValueError("\n".join(error_messages(checked, error, f"{key}." if key else ""))) from error

        checked.__init__ = named_init
        return checked

    return as_dataclass


def changed(a_section: Any, *names: str) -> dict[str, tuple[Any, Any]]:
    """Value and default of those of the named fields that are not at their default; each of them has one."""
    fields, found = {field.name: field for field in dataclasses.fields(a_section)}, {}
    for name in names:
        default = factory() if callable(factory := fields[name].default_factory) else fields[name].default
        if (value := getattr(a_section, name)) != default:
            found[name] = value, default
    return found


def type_at(root: Any, key: str) -> Any:
    """The declared type of what is at a dotted key; None where no such key can exist.

    In a map of the user's own keys every key exists; where the entries are sections, their keys are known again.
    """
    hint = root
    for name in key.split("."):
        if dataclasses.is_dataclass(hint):
            # get_type_hints leaves Annotated out, so hints are plain types.
            hint = get_type_hints(hint).get(name)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            return None
    return hint


def in_open_map(root: Any, key: str) -> bool:
    """Whether ``key`` is a map of the user's own keys, or is in one."""
    parts = key.split(".")
    return any(get_origin(type_at(root, ".".join(parts[:end]))) is dict for end in range(1, len(parts) + 1))


def all_keys(root: Any, prefix: str = "") -> list[str]:
    """Every key that holds a value; of a map of sections also the keys of an entry, which is called NAME."""
    keys: list[str] = []
    for name, hint in get_type_hints(root).items():
        is_map = get_origin(hint) is dict
        key, below = f"{prefix}{name}", get_args(hint)[1] if is_map else hint
        if is_map or not dataclasses.is_dataclass(below):
            keys.append(key)
        if dataclasses.is_dataclass(below):
            keys += all_keys(below, f"{key}.NAME." if is_map else f"{key}.")
    return keys


def unknown_key_message(root: Any, key: str) -> str:
    """The error for a key that does not exist, with known ones: of the same last name first, then by spelling."""

    def closeness(known: str) -> tuple[bool, float]:
        same_name = known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        return same_name, difflib.SequenceMatcher(None, key, known).ratio()

    nearest = sorted(all_keys(root), key=closeness, reverse=True)[:3]
    return f"{key} is no known key; did you mean {', '.join(nearest)}?"


def error_messages(root: Any, error: ValidationError, prefix: str = "") -> list[str]:
    """What is wrong with a ``root``, a line each with key, value and what it must be; ``prefix``: of its keys."""
    return [_message(root, found, prefix) for found in error.errors()]


def _message(root: Any, error: Any, prefix: str) -> str:
    kind, parts = error["type"], [str(part) for part in error["loc"]]
    if kind == "value_error":  # a check of a whole section, whose text names its keys
        return str(error["ctx"]["error"])
    if kind == "unexpected_keyword_argument":
        return prefix + unknown_key_message(root, ".".join(parts))
    while parts and type_at(root, ".".join(parts)) is None:  # an item of a list, or an alternative of several types
        parts.pop()
    key = ".".join(parts)
    text = error["msg"].replace("Input should", "must")
    null = ", or null" if type(None) in get_args(type_at(root, key)) else ""
    return f"{prefix}{key}={error['input']!r} {text}{null}"

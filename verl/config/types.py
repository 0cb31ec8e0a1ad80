"""Sections and their types: what may be written in a YAML file, on a command line or in an environment variable.

pydantic checks both. Numbers and booleans are strict (True is not 1), but a text counts as what it spells, for
``${oc.env:N}`` gives texts; whole numbers serve as floats, and numbers as texts.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from verl.config.schema import error_messages

Section = TypeVar("Section")


@dataclass_transform(field_specifiers=(field, Field))
def section(key: str = "") -> Callable[[type[Section]], type[Section]]:
    """Make a class a dataclass that checks its fields, and names ``key`` in the errors of one that is built in code."""

    def as_dataclass(cls: type[Section]) -> type[Section]:
        checked: Any = dataclass(cls, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
        # pydantic builds sections inside a section without __init__, so only the outermost one reports.
        init = checked.__init__

        @functools.wraps(init)
        def named_init(self: Any, *arguments: Any, **settings: Any) -> None:
            try:
                init(self, *arguments, **settings)
            except ValidationError as error:
                if unknown := [e["loc"][0] for e in error.errors() if e["type"] == "unexpected_keyword_argument"]:
                    # As of any dataclass; the keys of a file or a command line are reported by ``error_messages``.
                    raise TypeError(f"{cls.__name__} has no field {', '.join(map(str, unknown))}") from error
                raise ValueError("\n".join(error_messages(checked, error, f"{key}." if key else ""))) from error

        checked.__init__ = named_init
        return checked

    return as_dataclass


def spelled(value: Any) -> Any:
    """The number or boolean that a text spells, else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except ValueError:
        return value


def _listed(value: Any) -> Any:
    """The list that a text stands for: its only item, or one that kept the quotes of its shell line ('[a,b]')."""
    if not isinstance(value, str):
        return value
    if value.startswith("[") and value.endswith("]"):
        return [item.strip(" '\"") for item in value[1:-1].split(",") if item.strip()]
    return [value] if value else []


Bool = Annotated[bool, Strict(), BeforeValidator(spelled)]
Int = Annotated[int, Strict(), BeforeValidator(spelled)]
Count = Annotated[Int, Field(ge=1)]
Float = Annotated[float, Strict(), BeforeValidator(spelled)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]

IsListed = BeforeValidator(_listed)
Texts = Annotated[list[str], IsListed]

NullIsEmpty = BeforeValidator(lambda value: {} if value is None else value)
Options = Annotated[dict[str, Any], NullIsEmpty]
"""Keys of the user's choice; null: none."""

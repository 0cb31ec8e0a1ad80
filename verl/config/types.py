"""Types of settings: what may be written in a YAML file, on a command line or in an environment variable.

pydantic checks them. Numbers and booleans are strict (True is not 1), but a text counts as what it spells, for
``${oc.env:N}`` gives texts; whole numbers serve as floats, and numbers as texts.
"""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, Strict

SECTION = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
"""How every section is checked: a key that is not a field is an error."""


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

"""Settings that are a dataclass for Python and options for the command line, described in one place.

In: a dataclass whose fields are made by `option`. Out: an argparse option for each, ``--its-name``.
"""

import argparse
from dataclasses import MISSING, field, fields
from typing import Any


def option(default: Any = MISSING, *, help: str, **keywords: Any) -> Any:
    """A field of a dataclass with its option's help text.

    Args:
        default: of field and option; where there is none, both are required.
        help: what the setting means.
        keywords: passed to ``add_argument``; ``type`` is that of the default, or ``str``; False makes a flag.
    """
    if default is not MISSING:
        reading = {"action": "store_true"} if default is False else {"type": str if default is None else type(default)}
        keywords = {"default": default, **reading, **keywords}
    return field(default=default, metadata={"help": help, "required": default is MISSING, **keywords})


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add an option per field of ``config_class`` that was made by `option`."""
    for setting in fields(config_class):
        if setting.metadata:
            parser.add_argument(f"--{setting.name.replace('_', '-')}", **setting.metadata)

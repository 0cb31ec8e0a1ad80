"""What commands share: their parser, and text of users on terminals that lack some characters."""

import argparse
import io
import sys
from typing import Any


def escape_unknown_characters() -> None:
    """Write what standard output cannot encode as escapes (``\\u63a8``), as standard error does by itself.

    Called first by commands that print rows, tokens, names or paths of users.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def command_parser(module: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser for a command, with the first line of its description.

    Its usage says ``kai-verl COMMAND`` where that started it, else ``python -m MODULE``. ``options`` go to argparse.
    """
    name = sys.argv[0] if sys.argv[0].startswith("kai-verl ") else f"python -m {module}"
    return argparse.ArgumentParser(prog=name, description=str(description).splitlines()[0], **options)

"""What commands share: their name in usage lines, and text of users on terminals that lack some characters."""

import io
import sys


def escape_unknown_characters() -> None:
    """Write what standard output cannot encode as escapes (``\\u63a8``), as standard error does by itself.

    Called first by commands that print rows, tokens, names or paths of users.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def program_name(module: str) -> str:
    """What the usage of a command says: ``kai-verl COMMAND`` where that started it, else ``python -m MODULE``."""
    return sys.argv[0] if sys.argv[0].startswith("kai-verl ") else f"python -m {module}"

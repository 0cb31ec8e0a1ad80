"""Text of users on terminals that lack some of its characters."""

import io
import sys


def escape_unknown_characters() -> None:
    """Write what standard output cannot encode as escapes (``\\u63a8``), as standard error does by itself.

    Called first by commands that print rows, tokens, names or paths of users.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")

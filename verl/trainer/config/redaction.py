"""Keeps secrets out of what is printed and saved.

A secret is a text below a key whose last word is one of ``SECRET_WORDS``. Only open maps are searched (the arguments of
``ray.init``, engine options): the keys of this project itself hold none.
"""

import re
from typing import Any

SECRET_WORDS = frozenset(
    {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
)
REDACTED = "***"


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``WANDB_API_KEY`` and ``AWS_ACCESS_KEY_ID`` do.

    Whole words count: ``TOKENIZERS_PARALLELISM`` is none.
    """
    return not SECRET_WORDS.isdisjoint(re.split(r"[^A-Z0-9]+", name.upper()))


def redacted(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists with the texts of secret names replaced by ``***``."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    return REDACTED if isinstance(value, str) and looks_secret(name) else value

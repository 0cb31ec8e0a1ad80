"""Keeps secrets out of what is printed and saved.

A secret is a text below a key with a word such as ``TOKEN``. Only open maps are searched (the arguments of
``ray.init``, engine options): the keys of this project itself hold none.
"""

import re
from typing import Any

# Whole words; the second line's as the last of several: ``PWD`` alone is a folder, and ``SSH_AUTH_SOCK`` a path.
_SECRET = re.compile(
    r"(?<![A-Z0-9])(KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|[A-Z0-9]*CREDENTIALS?)(?![A-Z0-9])"
    r"|[A-Z0-9][^A-Z0-9]+(PASS|PWD|AUTH)[^A-Z0-9]*$"
)
REDACTED = "***"


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``WANDB_API_KEY`` and ``AWS_ACCESS_KEY_ID`` do.

    Whole words count: ``TOKENIZERS_PARALLELISM`` is none.
    """
    return _SECRET.search(name.upper()) is not None


def redacted(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists with the texts of secret names replaced by ``***``."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    return REDACTED if isinstance(value, str) and looks_secret(name) else value

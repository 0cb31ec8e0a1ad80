"""Keeps secrets out of what is printed and saved.

A secret is a text below a key that holds one of ``SECRET_WORDS`` or ends in one of ``SECRET_ENDINGS``. Only open maps
are searched (the arguments of ``ray.init``, engine options): the keys of this project itself hold none.
"""

import re
from typing import Any

SECRET_WORDS = frozenset(
    {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
)
SECRET_ENDINGS = frozenset({"PASS", "PWD", "AUTH"})
"""Secret as the last of several words: ``PWD`` alone is a folder, and ``SSH_AUTH_SOCK`` a path."""
REDACTED = "***"


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``WANDB_API_KEY`` and ``AWS_ACCESS_KEY_ID`` do.

    Whole words count: ``TOKENIZERS_PARALLELISM`` is none.
    """
    words = [word for word in re.split(r"[^A-Z0-9]+", name.upper()) if word]
    ends_secret = len(words) > 1 and words[-1] in SECRET_ENDINGS
    return ends_secret or any(word in SECRET_WORDS or word.endswith("CREDENTIAL") for word in words)


def redacted(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists with the texts of secret names replaced by ``***``."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    return REDACTED if isinstance(value, str) and looks_secret(name) else value

"""Loading tokenizers.

In: a folder (or hub name). Out: a tokenizer that can pad. Chat templates, prompts and masks are not dealt with here.
"""

import logging
import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def hf_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a pad token (its end token) where it has none.

    Raises ValueError where ``path`` holds no tokenizer, or one that has neither a pad nor an end token.
    """
    name = os.path.expanduser(str(path))
    # Without this check a mistyped folder is taken for a hub name, and the message is about repository ids.
    if name.startswith(("/", ".")) and not os.path.isdir(name):
        raise ValueError(f"the tokenizer folder {name!r} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no tokenizer could be loaded from {name!r} ({reason}); "
            "give a folder that holds tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty tokenizer of a folder that holds only a model's config.
        raise ValueError(
            f"{name!r} holds no tokenizer that can encode text; copy tokenizer.json and tokenizer_config.json "
            "there, or name their folder as model.tokenizer_path"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer in {name!r} has neither a pad token nor an end token; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning("the tokenizer in %s has no pad token; its end token %s is used", name, tokenizer.eos_token)
    return tokenizer

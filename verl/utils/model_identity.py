"""What tells one model from another without reading all of it.

In: a model's folder or hub name. Out: flat facts: the entries of its config.json, and digests of its tokenizer and of
samples of its weights. A folder that was moved or copied gives the same facts. Of a hub name only what is in the local
cache is looked at; nothing is fetched. Whether two models fit together is ``vocab_contract``'s question.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from verl.utils.tokenizer import local_model_folder

VOLATILE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Entries of config.json that another save of the same model may change."""
SAMPLES, SAMPLE_BYTES = 32, 4096
DIGEST_DIGITS = 16


def model_facts(model: str | None, tokenizer: str | None = None) -> dict[str, Any]:
    """Facts by name; none where there is no model, or it is not on this machine.

    Args:
        model: folder or hub name.
        tokenizer: the same, where it is not the model's.
    """
    folder = local_model_folder(model)
    if folder is None:
        return {}
    facts: dict[str, Any] = {}
    config = folder / "config.json"
    if config.is_file():
        entries = json.loads(config.read_text(encoding="utf-8"))
        facts |= {f"config.{name}": value for name, value in entries.items() if name not in VOLATILE}
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if weights:
        facts["weights"] = _digest_of_samples(weights)
    words = (local_model_folder(tokenizer) or folder) / "tokenizer.json"
    if words.is_file():
        facts["tokenizer"] = hashlib.sha256(words.read_bytes()).hexdigest()[:DIGEST_DIGITS]
    return facts


def _digest_of_samples(files: list[Path]) -> str:
    """Of the files' sizes and of pieces spread evenly over each: other weights differ nearly everywhere."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as stream:
            for number in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:DIGEST_DIGITS]

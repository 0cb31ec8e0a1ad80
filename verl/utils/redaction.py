"""Keeps secrets out of what is printed and saved, the configuration of a run among it.

A secret is a text below a key with a word such as ``TOKEN``. Only open maps are searched (the arguments of
``ray.init`` and of the reward function, engine options): the keys of this project itself hold none.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config import PPOConfig

# Whole words; the second line's as the last of several: ``PWD`` alone is a folder, and ``SSH_AUTH_SOCK`` a path.
_SECRET = re.compile(
    r"(?<![A-Z0-9])(KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|[A-Z0-9]*CREDENTIALS?)(?![A-Z0-9])"
    r"|[A-Z0-9][^A-Z0-9]+(PASS|PWD|AUTH)[^A-Z0-9]*$"
)
_NEVER_A_COUNT = re.compile(r"APIKEY|SECRET|PASS(WORD|WD|PHRASE)|_KEY$")
"""Of secret names those of which a number is a secret too; ``num_key_value_heads`` is none."""
REDACTED = "***"


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``WANDB_API_KEY`` and ``AWS_ACCESS_KEY_ID`` do.

    Whole words count: ``TOKENIZERS_PARALLELISM`` is none.
    """
    return _SECRET.search(name.upper()) is not None


def redacted(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists with the texts, or numbers, of secret names replaced by ``***``."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    is_number = type(value) in (int, float) and _NEVER_A_COUNT.search(name.upper())
    return REDACTED if (isinstance(value, str) or is_number) and looks_secret(name) else value


def public_dict(config: PPOConfig) -> dict[str, Any]:
    """The configuration as nested plain values without secrets, for loggers and saved files."""
    values = dataclasses.asdict(config)
    models, teachers = values["actor_rollout_ref"], values["algorithm"]["distill"]["teachers"]
    for section in (models["rollout"], models["ref"], *teachers.values()):
        section["engine_kwargs"] = redacted(section["engine_kwargs"])
    return values | {key: redacted(values[key]) for key in ("ray_kwargs", "custom_reward_function")}


def save_config(config: PPOConfig, path: str | Path) -> None:
    """Write the configuration as YAML without secrets; makes the folder where it is missing.

    Another configuration at that path, of an earlier run in the same folder, is kept beside it, numbered:
    ``config.1.yaml`` is the oldest.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(public_dict(config)))
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(place for place in numbered if not place.exists()))
    path.write_text(text, encoding="utf-8")

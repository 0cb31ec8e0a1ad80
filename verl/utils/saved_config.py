"""The configuration of a run as plain values and as a saved file, without secrets."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.utils.redaction import redacted


def public_dict(config: PPOConfig) -> dict[str, Any]:
    """The configuration as nested plain values without secrets, for loggers and saved files."""
    values = dataclasses.asdict(config)
    values["ray_kwargs"] = redacted(values["ray_kwargs"])
    rollout = values["actor_rollout_ref"]["rollout"]
    rollout["engine_kwargs"] = redacted(rollout["engine_kwargs"])
    return values


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

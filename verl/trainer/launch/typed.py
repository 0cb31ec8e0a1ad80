"""From a composed Hydra configuration to the dataclasses.

In: a ``DictConfig``. Out: a ``PPOConfig``, interpolations resolved, every value of its declared type, all checks of the
sections done. Keys that a configuration leaves out keep the default of their dataclass. Not here: checks that look at
files, models or packages (``checks``).
"""

import logging
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from verl.config.ppo import PPOConfig
from verl.config.schema import error_messages
from verl.trainer.launch.command_line import normalized_argv
from verl.trainer.launch.no_effect import find_no_effect, no_effect_notice

logger = logging.getLogger(__name__)


def to_typed(cfg: DictConfig) -> PPOConfig:
    """The configuration as dataclasses; logs keys that have no effect here.

    Raises:
        ValueError: values that do not fit, unknown keys, interpolations without a target, or settings that exclude each
            other; a line each, with key, value and fix.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'configuration'} cannot be resolved: {error.msg or error}") from error
    try:
        return TypeAdapter(PPOConfig).validate_python(_drop_keys_without_effect(values))
    except ValidationError as error:
        raise ValueError("\n".join(error_messages(PPOConfig, error))) from error


def _drop_keys_without_effect(values: Any, prefix: str = "") -> Any:
    """The values of a section without the keys that are accepted and have no effect."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        effect = find_no_effect(key)
        if effect is None:
            kept[name] = _drop_keys_without_effect(value, f"{key}.")
        else:
            logger.warning(no_effect_notice(key, effect, str(value)))
    return kept


def load_config(
    overrides: Sequence[str] = (),
    config_module: str = "verl.trainer.config",
    config_name: str = "ppo_trainer",
) -> PPOConfig:
    """Compose and type a configuration outside ``hydra.main``, from overrides as they stand on a command line.

    Raises:
        ValueError: see ``normalize_overrides`` and ``to_typed``.
    """
    with initialize_config_module(config_module=config_module, version_base=None):
        return to_typed(compose(config_name=config_name, overrides=normalized_argv(overrides)))

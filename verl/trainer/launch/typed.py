"""From a composed Hydra configuration to the dataclasses, and from the dataclasses to a saved YAML.

In: a ``DictConfig``. Out: a ``PPOConfig`` in which every value has its declared type, interpolations resolved. A value
that does not fit its type, and a key that does not exist, are a ``ValueError`` with the full key. Keys that a
configuration leaves out keep the default of their dataclass. Touches no file but the one ``save_config`` writes, and
checks no path: that is ``check_run``'s part.
"""

import dataclasses
import itertools
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.ppo import PPOConfig
from verl.config.schema import no_list_message, no_section_message, unknown_key_message
from verl.trainer.launch.command_line import normalized_argv
from verl.trainer.launch.no_effect import find_no_effect, no_effect_notice
from verl.utils.redaction import redacted

logger = logging.getLogger(__name__)

_SCALARS: dict[type, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def to_typed(cfg: DictConfig) -> PPOConfig:
    """The configuration as dataclasses, all checks of their ``__post_init__`` done.

    Raises:
        ValueError: a value of the wrong type, an unknown key, an interpolation without a target, or settings that
            exclude each other; the message gives key and value.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'configuration'} cannot be resolved: {error.msg or error}") from error
    config: PPOConfig = _to_dataclass(PPOConfig, values, "")
    _env_vars_to_text(config.ray_kwargs.ray_init)
    return config


def load_config(
    overrides: Sequence[str] = (),
    config_module: str = "verl.trainer.config",
    config_name: str = "ppo_trainer",
) -> PPOConfig:
    """Compose and type a configuration outside ``hydra.main``, from overrides as they stand on a command line.

    Raises:
        ValueError: see ``normalize_overrides`` and ``to_typed``.
    """
    from hydra import compose, initialize_config_module

    with initialize_config_module(config_module=config_module, version_base=None):
        return to_typed(compose(config_name=config_name, overrides=normalized_argv(overrides)))


def public_dict(config: PPOConfig) -> dict[str, Any]:
    """The configuration as nested plain values without secrets, for loggers and saved files."""
    values = dataclasses.asdict(config)
    values["ray_kwargs"] = redacted(values["ray_kwargs"])
    rollout = values["actor_rollout_ref"]["rollout"]
    rollout["engine_kwargs"] = redacted(rollout["engine_kwargs"])
    return values


def save_config(config: PPOConfig, path: str | Path) -> None:
    """Write the configuration as YAML without secrets; makes the folder where it is missing.

    Another configuration that lies there already, of an earlier run in the same folder, stays beside it, numbered:
    ``config.1.yaml`` is the oldest.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(public_dict(config)))
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        path.rename(next(place for place in _numbered(path) if not place.exists()))
    path.write_text(text, encoding="utf-8")


def _numbered(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))


def _env_vars_to_text(ray_init: dict[str, Any]) -> None:
    """Ray takes environment variables as texts only; a YAML file may hold numbers and booleans."""
    runtime_env = ray_init.get("runtime_env")
    if isinstance(runtime_env, dict) and "env_vars" in runtime_env:
        env_vars = runtime_env["env_vars"] or {}
        runtime_env["env_vars"] = {name: str(value) for name, value in env_vars.items()}


def _to_dataclass(config_class: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(no_section_message(path, values))
    prefix = f"{path}." if path else ""
    hints = get_type_hints(config_class)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name in hints:
            arguments[name] = _convert(value, hints[name], key)
        else:
            _check_unknown(key, value)
    try:
        return config_class(**arguments)
    except ValueError as error:
        # Sections that stand in several places do not know where they are.
        message = str(error)
        raise ValueError(message if path in message else f"{prefix}{message}") from error


def _check_unknown(key: str, value: Any) -> None:
    """Accept a key of a YAML file that has no effect here, or say that it is unknown."""
    effect = find_no_effect(key)
    if effect is None:
        raise ValueError(unknown_key_message(key))
    logger.warning(no_effect_notice(key, effect, str(value)))


def _convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as ``hint``, a field's declared type."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _to_dataclass(hint, value, key)
    if get_origin(hint) in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), key)
    if hint in _SCALARS:
        return _convert_scalar(value, hint, key)
    return _convert_container(value, hint, key)


def _convert_union(value: Any, options: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in options:
        return None
    # A list comes first: a text that may stand for a list becomes one.
    ordered = sorted(
        (option for option in options if option is not type(None)), key=lambda o: get_origin(o) is not list
    )
    for option in ordered[:-1]:
        try:
            return _convert(value, option, key)
        except ValueError:
            continue
    return _convert(value, ordered[-1], key)


def _convert_scalar(value: Any, expected: type, key: str) -> Any:
    """Exact types, but whole numbers serve as floats, numbers as texts, and texts (from ``${oc.env:N}``) as what they
    spell.
    """
    if isinstance(value, str) and expected is not str:
        value = _parse_scalar(value, expected)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool) != (expected is bool) or not isinstance(value, expected):
        raise ValueError(f"{key}={value!r} must be {_SCALARS[expected]}")
    return value


def _parse_scalar(text: str, expected: type) -> Any:
    """The number or boolean that ``text`` spells, else ``text``."""
    if expected is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return expected(text)
    except ValueError:
        return text


def _convert_container(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        # A list that kept the quotes of its shell line, such as '[console,file]'.
        value = [item.strip(" '\"") for item in value[1:-1].split(",") if item.strip()]
    if origin is dict:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError(no_section_message(key, value))
        return {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    if origin is list:
        items = ([value] if value else []) if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise ValueError(no_list_message(key, value))
        return [_convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(items)]
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(arguments):
            raise ValueError(f"{key}={value!r} must be a list of {len(arguments)}")
        return tuple(
            _convert(item, of, f"{key}[{i}]") for i, (item, of) in enumerate(zip(value, arguments, strict=True))
        )
    raise TypeError(f"{key} is declared as {hint}, which configurations do not support")

"""From a command line to the typed configuration.

::

    sys.argv ─► normalized_argv ─► Hydra composes ─► to_typed ─► PPOConfig

``normalized_argv`` turns a command line as users of verl write it into one that Hydra accepts:

- ``+key`` of a key that exists becomes ``++key`` (Hydra refuses to append what is there), likewise keys of open maps
  (``ray_kwargs.ray_init.*``, ``rollout.engine_kwargs.*``, ...);
- values of ``runtime_env.env_vars`` become texts, and secrets among them move to this process's environment;
- keys of verl that have no effect here (``config/no_effect.yaml``) are left out, with a notice each; those that have
  another name in this project are refused, and the error gives that name;
- values that Hydra's grammar cannot read, such as paths with ``=`` or brackets, are put in quotes;
- words with commas between them become a list where one is expected, unless they are a path that exists;
- flags (``--cfg job``, ``-cn name``) go after the overrides, unchanged.

Not here: checks that look at files, models or packages (``checks``).
"""

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from verl.config.ppo import PPOConfig
from verl.config.schema import error_messages, in_open_map, type_at, unknown_key_message
from verl.utils.redaction import REDACTED, looks_secret

logger = logging.getLogger(__name__)

ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars."
OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)
NO_EFFECT_FILE = Path(__file__).parents[1] / "config" / "no_effect.yaml"
NO_EFFECT: dict[str, dict[str, Any]] = {
    key: entry for entry in yaml.safe_load(NO_EFFECT_FILE.read_text(encoding="utf-8")) for key in entry["keys"]
}
"""The entry of each key, or pattern of keys, that has no effect here; the first that fits counts."""


def normalized_argv(argv: Sequence[str]) -> list[str]:
    """The command line that an entry point puts into ``sys.argv[1:]`` before it calls its ``hydra.main`` function.

    Logs a warning for each key without effect and each secret, and puts the secrets into ``os.environ``.

    Raises:
        ValueError: arguments that are no overrides, unknown keys (with the nearest known ones), values that would need
            something this project does not have; all of them in one message, a line each.
    """
    overrides, flags, errors = [], [], []
    for before, text in zip(("", *argv), argv, strict=False):
        # What follows a flag is its value, unless it is an override; write --config-dir=PATH where PATH holds a "=".
        if text.startswith("-") or (before.startswith("-") and "=" not in text and not text.startswith("~")):
            flags.append(text)
            continue
        try:
            overrides += _for_hydra(text)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return overrides + flags


def to_typed(cfg: DictConfig) -> PPOConfig:
    """The configuration as dataclasses, every value of its declared type; logs keys that have no effect here.

    Raises:
        ValueError: values that do not fit, unknown keys, interpolations without a target, or settings that exclude each
            other; a line each, with key, value and fix.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'configuration'} cannot be resolved: {error.msg or error}") from error
    errors: list[str] = []
    values = _with_effect(values, errors)
    if errors:
        raise ValueError("\n".join(errors))
    try:
        return TypeAdapter(PPOConfig).validate_python(values)
    except ValidationError as error:
        messages = error_messages(PPOConfig, error)
        wrong = {message.partition("=")[0] for message in messages}
        # A key that takes its value from another key, which is wrong too: the user set only that one.
        set_by_user = [message for message in messages if _source(cfg, message.partition("=")[0]) not in wrong]
        raise ValueError("\n".join(set_by_user)) from error


def _source(cfg: DictConfig, key: str) -> str | None:
    """The key that ``key`` takes its value from; None: it has one of its own."""
    value: Any = OmegaConf.to_container(cfg, resolve=False)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return found[1] if found else None


def load_config(
    overrides: Sequence[str] = (), config_module: str = "verl.trainer.config", config_name: str = "ppo_trainer"
) -> PPOConfig:
    """Compose and type a configuration outside ``hydra.main``, from overrides as they stand on a command line.

    Raises:
        ValueError: see ``normalized_argv`` and ``to_typed``.
    """
    with initialize_config_module(config_module=config_module, version_base=None):
        return to_typed(compose(config_name=config_name, overrides=normalized_argv(overrides)))


def _with_effect(values: Any, errors: list[str], prefix: str = "") -> Any:
    """The values of a section without the keys that are accepted and have no effect; ``errors`` gets those refused."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        try:
            notice = _no_effect_notice(f"{prefix}{name}", value)
        except ValueError as error:
            errors.append(str(error))
            continue
        if notice:
            logger.warning(notice)
        elif (below := _with_effect(value, errors, f"{prefix}{name}.")) or not value:  # a section may be emptied
            kept[name] = below
    return kept


def _no_effect_notice(key: str, value: Any) -> str | None:
    """The line that says a key does nothing; None for a key of ours, or that is not in the table.

    Raises:
        ValueError: ``value`` asks for something that is not built here, or that another key asks for.
    """
    entry = next((e for name, e in NO_EFFECT.items() if fnmatchcase(key, name) or fnmatchcase(f"{key}.", name)), None)
    if entry is None or type_at(PPOConfig, key) is not None:
        return None
    for name, below in value.items() if isinstance(value, dict) else ():
        _no_effect_notice(f"{key}.{name}", below)  # for its error: one line stands for the whole section
    plain, only, write = str(value).strip(" '\"").lower(), entry.get("only", []), entry.get("write")
    if (only or write) and {"": "null", "none": "null"}.get(plain, plain) not in only:
        if write:
            answer = write.format(value=value, name=key.split(".")[-2:][0])
            raise ValueError(f"{key}={value} is a setting of verl; write {answer}")
        raise ValueError(
            f"{key}={value} is not built here ({entry['why']}); leave it out or set it to {' or '.join(only)}"
        )
    return f"{key} is accepted and has no effect here: {entry['why']}"


def _for_hydra(text: str) -> list[str]:
    """An override as Hydra takes it; nothing where it has no effect here."""
    if "\r" in text:
        key = text.partition("=")[0]
        raise ValueError(f"{key!r} holds a carriage return; cut them off the script's lines: sed -i 's/\\r$//'")
    match = OVERRIDE.fullmatch(text)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise ValueError(f"{text!r} is no override; write key=value, without blanks around the equals sign")
    sign, key, value = match["sign"] or "", match["key"], match["value"] or ""
    if "/" in key or "@" in key or key.split(".")[0] == "hydra":
        return [text]  # config groups and Hydra's own settings
    if type_at(PPOConfig, key) is None:
        notice = _no_effect_notice(key, value)
        if notice is None:
            raise ValueError(unknown_key_message(PPOConfig, key))
        logger.warning(notice)
        return []
    if sign == "~":
        return [text]
    readable = _env_var(key, value) if key.startswith(ENV_VARS) else _readable(key, value)
    # Hydra refuses to append what is there, to set what is not, and a mapping with keys that have no effect here.
    added = "++" if sign or in_open_map(PPOConfig, key) or value.startswith("{") else ""
    return [f"{added}{key}={readable}"]


def _env_var(key: str, value: str) -> str:
    """The value of an environment variable as a quoted text; a secret becomes a reference to this process's own."""
    name = key.removeprefix(ENV_VARS)
    is_quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    # A reference to the environment shows nothing.
    if looks_secret(name) and not value.startswith("${"):
        os.environ[name] = value[1:-1] if is_quoted else value
        logger.warning("%s is a secret, and command lines can be read by others; export %s instead", key, name)
        return f"${{oc.env:{name}}}"
    return value if is_quoted else _in_quotes(value)


def _readable(key: str, value: str) -> str:
    """``value``, in quotes where Hydra cannot read it as it is and it is no list, mapping or quoted text.

    Words with commas between them become the list that ``key`` takes, unless they are a path that exists.

    Raises:
        ValueError: it is one of these and cannot be read, or is a list in the place of a section.
    """
    hint, path = type_at(PPOConfig, key), os.path.expanduser(value)
    if "," in value and "${" not in value and not re.match(r"[\[{'\"]|\w+\(", value):
        if os.path.exists(path) or glob.glob(path):
            return _in_quotes(value)
        if list in (get_origin(hint), *map(get_origin, get_args(hint))):
            return f"[{','.join(_in_quotes(item.strip()) for item in value.split(',') if item.strip())}]"
    try:
        read = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException as error:
        # Quotes around the value do not mend a key that the grammar cannot read, such as one with a *.
        if not value.startswith(("'", '"', "[", "{")) and re.fullmatch(r"[\w.:-]+", key):
            return _in_quotes(value)
        reason = str(error).splitlines()[0]
        if looks_secret(f"{key if in_open_map(PPOConfig, key) else ''}={value}"):
            value, reason = REDACTED, "a secret is not shown"
        raise ValueError(
            f"{key}={value} cannot be read ({reason}); close brackets and quotes, put texts with "
            "=, ( or ) in quotes, and give names with other characters as a mapping: KEY='{rec_*: 0.25}'"
        ) from error
    if isinstance(read, list) and (is_dataclass(hint) or get_origin(hint) is dict):
        raise ValueError(f"{key}={value} must be a mapping, such as {{name: value}}")
    return value


def _in_quotes(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()

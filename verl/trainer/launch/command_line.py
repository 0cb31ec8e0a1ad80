"""The command line as users of verl write it, turned into one that Hydra accepts.

In: ``sys.argv`` without the program. Out: the same overrides, with

- ``+key`` of a key that exists as ``++key`` (Hydra refuses to append what is there);
- keys of open maps (``ray_kwargs.ray_init.*``, ``rollout.engine_kwargs.*``, ...) as ``++key``;
- values of ``runtime_env.env_vars`` as texts, and secrets among them moved to this process's environment;
- keys without effect here left out, with a notice each (``no_effect``);
- values that Hydra's grammar cannot read, such as paths with ``=`` or brackets, in quotes;
- flags (``--cfg job``, ``-cn name``) unchanged, behind the overrides.

Not here: whether a value fits its key (``typed``).
"""

import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException

from verl.config.ppo import PPOConfig
from verl.config.schema import map_of, shape_errors, type_at, unknown_key_message
from verl.trainer.launch.no_effect import find_no_effect, no_effect_notice
from verl.utils.redaction import looks_secret

logger = logging.getLogger(__name__)

ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars"

QUOTES = ("'", '"')

FLAGS_WITH_VALUE = frozenset(
    {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
)
# They take a value only where the next argument is not an override.
FLAGS_WITH_OPTIONAL_VALUE = frozenset({"--info", "-i"})

OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass
class NormalizedOverrides:
    """A command line for Hydra, with notices and secrets."""

    argv: list[str] = field(default_factory=list)
    """Overrides, then flags."""
    notices: list[str] = field(default_factory=list)
    """One line for each key without effect and each secret, in the order of the command line."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variables that ``argv`` refers to as ``${oc.env:NAME}``."""


def normalize_overrides(argv: Iterable[str]) -> NormalizedOverrides:
    """Turn a command line into one that Hydra accepts.

    Raises:
        ValueError: arguments that are no overrides, unknown keys (with the nearest known ones), values that would need
            something this project does not have; all of them in one message, a line each.
    """
    overrides, flags = split_flags(list(argv))
    result = NormalizedOverrides()
    errors: list[str] = []
    for text in overrides:
        try:
            _add_override(text, result)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    result.argv += flags
    result.notices = list(dict.fromkeys(result.notices))
    return result


def normalized_argv(argv: Sequence[str]) -> list[str]:
    """The command line that an entry point puts into ``sys.argv[1:]`` before it calls its ``hydra.main`` function.

    Logs the notices as warnings and puts the secrets into ``os.environ``.

    Raises:
        ValueError: see ``normalize_overrides``.
    """
    result = normalize_overrides(argv)
    for notice in result.notices:
        logger.warning(notice)
    os.environ.update(result.secrets)
    return result.argv


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The overrides, and Hydra's flags with their values."""
    overrides: list[str] = []
    flags: list[str] = []
    rest = iter(argv)
    for text in rest:
        if not text.startswith("-"):
            overrides.append(text)
            continue
        flags.append(text)
        if text in FLAGS_WITH_VALUE:
            flags += itertools.islice(rest, 1)
        elif text in FLAGS_WITH_OPTIONAL_VALUE:
            for following in itertools.islice(rest, 1):
                (overrides if "=" in following else flags).append(following)
    return overrides, flags


def _add_override(text: str, result: NormalizedOverrides) -> None:
    match = OVERRIDE.fullmatch(text)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise ValueError(f"{text!r} is no override; write key=value, without blanks around the equals sign")
    sign, key, value = match["sign"] or "", match["key"], match["value"]
    if "/" in key or "@" in key or key == "hydra" or key.startswith("hydra."):
        result.argv.append(text)  # config groups and Hydra's own settings
        return
    if type_at(PPOConfig, key) is None:
        effect = find_no_effect(key)
        if effect is None:
            raise ValueError(unknown_key_message(PPOConfig, key))
        if sign != "~":
            result.notices.append(no_effect_notice(key, effect, value))
        return
    open_map = map_of(PPOConfig, key)
    if open_map is not None:
        _check_characters(key, open_map)
    if sign == "~":
        result.argv.append(f"~{key}" if open_map is None else text)
        return
    readable = _env_var(key, value, result) if key.startswith(f"{ENV_VARS}.") else _readable(key, value)
    # Hydra refuses to append what is there, to set what is not, and a mapping with keys that have no effect here.
    added = "++" if sign or open_map is not None or value.startswith("{") else ""
    result.argv.append(f"{added}{key}={readable}")


def _check_characters(key: str, open_map: str) -> None:
    """Hydra takes some characters of a user's own name only inside a mapping."""
    try:
        OverridesParser.create().parse_override(f"{key}=0")
    except HydraException as error:
        raise ValueError(
            f"{key} holds characters that a key cannot have; give the mapping as a whole: "
            f"{open_map}='{{{key.removeprefix(open_map + '.')}: ...}}'"
        ) from error


def _env_var(key: str, value: str, result: NormalizedOverrides) -> str:
    """The value of an environment variable as a quoted text; a secret becomes a reference to this process's own."""
    name = key.removeprefix(f"{ENV_VARS}.")
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in QUOTES
    if looks_secret(name) and not value.startswith("${"):
        result.secrets[name] = value[1:-1] if quoted else value
        result.notices.append(f"{key} is a secret, and command lines can be read by others; export {name} instead")
        return f"${{oc.env:{name}}}"
    return value if quoted else _in_quotes(value)


def _readable(key: str, value: str) -> str:
    """``value``, in quotes where Hydra cannot read it as it is and it is no list, mapping or quoted text.

    Raises:
        ValueError: it is one of these and cannot be read, or is of another shape than what belongs at ``key``.
    """
    try:
        # "key" instead of the key, whose characters Hydra would otherwise report as a fault of the value.
        read = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException as error:
        if not value.startswith((*QUOTES, "[", "{")):
            return _in_quotes(value)
        raise ValueError(
            f"{key}={value} cannot be read ({str(error).splitlines()[0]}); close every bracket and quote, write the "
            "names of a mapping without quotes, and put an entry that holds =, ( or ) in quotes"
        ) from error
    if not isinstance(read, Sweep) and (wrong := [*shape_errors(PPOConfig, key, read)]):
        raise ValueError("\n".join(wrong))
    return value


def _in_quotes(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()

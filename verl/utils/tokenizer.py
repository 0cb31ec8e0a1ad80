"""Where a model lies on this machine, and its tokenizer.

In: a folder or a hub name. Out: a folder, its own or that of the hub's local cache; a tokenizer that can pad and has
the ids of its files, and its export; the text of a conversation and of an answer. Not here: prompts, masks.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.utils.broken_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEMPLATE_DATE = date(2024, 7, 26)
"""The date that Llama's templates write where they know none."""
TOOLS_KEY = "actor_rollout_ref.rollout.multi_turn.tool_config_path"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens that a tokenizer names by what they do."""
CONFIG = "tokenizer_config.json"


def local_model_folder(model: str | None, file: str = "config.json") -> Path | None:
    """The folder of a model; None without a model, or where it is not on this machine. Fetches nothing.

    Args:
        file: what the hub's cache must hold of a model that has no folder of its own.
    """
    if not model:
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    # Not before it is needed: the models of most runs are folders.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, file)
    except HFValidationError:  # not a name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def position_limit(described: Mapping[str, Any]) -> float | None:
    """The positions that a model knows by its config.json, stretched ones included; None: it does not say.

    Not of ropes whose frequencies transformers chooses by the longest row of a pass: scores would depend on the others.
    """
    limit = described.get("max_position_embeddings")
    # transformers 5 writes rope_parameters, of some models by kind of layer; older models have rope_scaling.
    ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := described.get(name), dict)]
    ropes += [inner for rope in ropes for inner in rope.values() if isinstance(inner, dict)]
    for rope in ropes:
        kind, own = rope.get("rope_type", rope.get("type")), "original_max_position_embeddings"
        if limit is not None and kind in ("yarn", "linear"):
            # Of other types, max_position_embeddings is the stretched length already.
            limit = max(limit, rope.get("factor", 1) * (rope.get(own) or limit))
        elif limit is not None and kind in ("longrope", "dynamic"):
            limit = min(limit, rope.get(own) or described.get(own) or limit)
    return limit


def hf_tokenizer(path: str | Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and give it a pad token (its end token) where it has none.

    Raises ValueError where ``path`` holds no tokenizer, or one that has neither a pad nor an end token, other ids than
    its files, or ids with a gap.
    """
    from transformers import AutoTokenizer

    name = os.path.expanduser(str(path))
    # Without this check a mistyped folder is taken for a hub name, and the message is about repository ids.
    if name.startswith(("/", ".")) and not os.path.isdir(name):
        raise ValueError(f"the tokenizer folder {name!r} does not exist")
    files = f"tokenizer.json and {CONFIG}"
    written = _written_ids(local_model_folder(name, CONFIG))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no tokenizer could be loaded from {name!r} ({reason}); name a folder with {files}"
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty tokenizer of a folder that holds only a model's config.
        raise ValueError(f"{name!r} holds no tokenizer that can encode text; copy {files} there")
    # transformers numbers added tokens afresh, and some of its classes take them from one of the files alone.
    loaded = tokenizer.get_vocab()
    written.append(("a vocabulary without gaps", max(loaded, key=loaded.__getitem__), len(set(loaded.values())) - 1))
    others = [entry for entry in written if loaded.get(entry[1]) != entry[2]]
    if others:
        where, token, token_id = others[0]
        raise ValueError(
            f"the tokenizer in {name}: {token!r} has the id {loaded.get(token, 'none')} as it loads and {token_id} in "
            f"{where}, one of {len(others):,} such tokens; take all its files from one export, with ids without a gap"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name!r}: neither a pad token nor an end token; set pad_token in {CONFIG}")
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning("the tokenizer in %s has no pad token; its end token %s is used", name, tokenizer.eos_token)
    return tokenizer


def _written_ids(folder: Path | None) -> list[tuple[str, str, int]]:
    """File, token and id of every added token in the files; raises ValueError where one cannot be read."""
    found: list[tuple[str, str, int]] = []
    for path in (folder / name for name in ("tokenizer.json", CONFIG, "added_tokens.json") if folder):
        values = read_json(path, "copy it again")
        if path.name == "added_tokens.json":
            values = {"added_tokens": [{"content": token, "id": token_id} for token, token_id in values.items()]}
        added = [(token["id"], token) for token in values.get("added_tokens", [])]
        added += values.get("added_tokens_decoder", {}).items()
        found += [(path.name, token["content"], int(token_id)) for token_id, token in added]
    return found


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Write a tokenizer as transformers 4 and other programs can load it too, with nothing of this machine."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if key not in ("is_local", "local_files_only")}
    # The names of transformers 4, which 5 still takes; 4 fails at the new ones.
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values["tokenizer_class"] == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed_ids(*entries: int | list[int] | None) -> tuple[int, ...]:
    """Ids out of entries such as ``eos_token_id``, each of them one id, a list or None; every id once."""
    lists = [entry if isinstance(entry, list) else [entry] for entry in entries]
    return tuple(dict.fromkeys(token_id for ids in lists for token_id in ids if token_id is not None))


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """What a model wrote, without the tokens that end, frame or pad a turn.

    Item tokens stay, special ones too, as which many models have them.
    """
    hidden = _framing_tokens(tokenizer, str(tokenizer.chat_template))
    return tokenizer.decode([token for token in ids if token not in hidden], skip_special_tokens=False)


def types_special_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Whether a text holds what reads as a token that ends, frames or pads a turn: encoded, it is that token."""
    return any(token and token in text for token in _framing_tokens(tokenizer, str(tokenizer.chat_template)).values())


@lru_cache(maxsize=4)
def _framing_tokens(tokenizer: "PreTrainedTokenizerBase", template: str) -> dict[int, str]:
    """Special tokens with a role (end, padding, ...), in the chat template, or that generation_config.json ends with.

    By id; one that is no added token has no text, since a text that reads alike need not become it.
    """
    from transformers import GenerationConfig

    roles = (getattr(tokenizer, f"{role}_token_id", None) for role in ROLES)
    added = tokenizer.added_tokens_decoder
    in_template = (token_id for token_id, token in added.items() if token.special and token.content in template)
    folder, ends = local_model_folder(tokenizer.name_or_path), None
    if folder is not None and (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return {token: str(added.get(token, "")) for token in listed_ids(*roles, *in_template, ends)}


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as text, up to where the assistant begins to write.

    A template that writes today's date gets `TEMPLATE_DATE`, so that prompts are the same on all days, after a resume
    and for the teacher.

    Args:
        tools: OpenAI function schemas.
        options: of the template, such as ``enable_thinking``.

    Raises:
        TemplateError, TypeError, ValueError: the template refuses the messages.
    """
    dated = {"strftime_now": TEMPLATE_DATE.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}
    text: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] if tools else None,
        add_generation_prompt=True,
        tokenize=False,
        **dated,
        **(options or {}),
    )
    return text


def fit_tool_calls(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have arguments as the chat template takes them, as objects or as JSON texts."""
    if not any(message.get("tool_calls") for message in messages):
        return list(messages)
    texts = _takes_texts(tokenizer, str(tokenizer.chat_template))
    return [_with_arguments(message, texts) for message in messages]


def _with_arguments(message: Mapping[str, Any], texts: bool) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON texts, or as objects."""

    def written(arguments: Any) -> Any:
        if texts:
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:  # a text that is no object is for the template to take or to refuse
            return arguments
        return parsed if isinstance(parsed, Mapping) else arguments

    def call_of(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": call_of(call["function"])}
        return {**call, "arguments": written(call["arguments"])} if "arguments" in call else dict(call)

    calls = message.get("tool_calls")
    return dict(message) | ({"tool_calls": [call_of(call) for call in calls]} if isinstance(calls, list) else {})


@lru_cache(maxsize=4)
def _takes_texts(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """Whether the chat template takes arguments of tool calls as JSON texts alone: an object fails where a text does
    not, or shows as Python would write it."""
    of_object, of_text = (_render_call(tokenizer, template, given) for given in ({"key": "value"}, '{"key": "value"}'))
    return of_text is not None and (of_object is None or "{'key'" in of_object)


def _render_call(tokenizer: "PreTrainedTokenizerBase", template: str, arguments: Any) -> str | None:
    """A conversation with one tool call; None where the template refuses it."""
    from jinja2 import TemplateError

    # Mistral's templates want an id of nine letters.
    call = {"type": "function", "id": "callprobe", "function": {"name": "probe", "arguments": arguments}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "callprobe", "name": "probe", "content": "result"},
    ]
    try:
        text: Any = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
        return None
    return text

"""From one cell of a parquet file to clean chat messages.

In: a ``messages`` value as it is found in the wild (JSON text, Python literal text, bytes, a list, a struct). Out: a
list of ``{"role", "content"}`` with text content, or a BadRowError that says what is wrong. Text is never evaluated
as code. Chat templates and tokens come later.
"""

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""What chat templates read of a message beside its role and content."""

Message = dict[str, Any]


class BadRowError(ValueError):
    """A row that cannot be used: ``reason`` is a short code to count by, ``detail`` says it for a reader."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def parse_messages(value: Any) -> list[Message]:
    """Read a ``messages`` value: role names in lower case, contents joined to one text.

    Raises:
        BadRowError: with reason ``no_messages``, ``unreadable_messages``, ``unknown_role``, ``null_content``,
            ``non_text_content``, ``unencodable_text`` or ``blank_user_turn``.
    """
    try:
        return [_parse_message(turn, number) for number, turn in enumerate(_decode(value), 1)]
    except RecursionError as error:
        raise BadRowError("unreadable_messages", "nested too deeply") from error


def split_answer(messages: list[Message]) -> tuple[list[Message], str]:
    """Split a chat at its last assistant message: what came before it is the prompt, its content the ground truth.

    Raises:
        BadRowError: with reason ``no_assistant_turn`` or ``no_user_turn`` (none before the answer).
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no_assistant_turn", f"the roles are {', '.join(message['role'] for message in messages)}")
    prompt = messages[: answers[-1]]
    require_user_turn(prompt)
    return prompt, messages[answers[-1]]["content"]


def require_user_turn(prompt: list[Message]) -> None:
    """Raise BadRowError ``no_user_turn`` where nobody asks anything."""
    if not any(message["role"] == "user" for message in prompt):
        raise BadRowError("no_user_turn", "the prompt holds no user message")


def _decode(value: Any) -> list[Any]:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError("unreadable_messages", f"bytes that are not UTF-8: {error}") from error
    if isinstance(value, str):
        text = value.removeprefix("\ufeff").strip()
        value = _decode_text(text) if text else None
    if isinstance(value, Mapping):
        value = _rows_of(value) if value else None
    if value is None or (isinstance(value, list | tuple) and not value):
        raise BadRowError("no_messages", "the cell is empty")
    if not isinstance(value, list | tuple):
        raise BadRowError("unreadable_messages", f"a {type(value).__name__}, not a list of messages")
    return list(value)


def _decode_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as json_error:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python about backslashes in the user's text
                return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BadRowError("unreadable_messages", f"neither JSON nor a Python literal: {json_error}") from json_error


def _rows_of(struct: Mapping[str, Any]) -> list[Any]:
    """One message, or the columns of several (``{"role": [...], "content": [...]}``), as a list of messages."""
    roles, contents = struct.get("role"), struct.get("content")
    if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return [struct]


def _parse_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRowError("unreadable_messages", f"message {number} is a {type(turn).__name__}, not a mapping")
    role = turn.get("role")
    role = role.lower() if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRowError("unknown_role", f"message {number} has the role {turn.get('role')!r}")
    extras = {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key) is not None}
    _require_json(extras, number)
    content = turn.get("content")
    if content is None and extras.get("tool_calls"):
        content = ""  # a turn that only calls tools
    text = _text_of(content, number)
    _require_encodable(text, number)
    if role == "user" and not text.strip():
        raise BadRowError("blank_user_turn", f"message {number} is blank")
    return {"role": role, "content": text, **extras}


def _require_json(extras: dict[str, Any], number: int) -> None:
    """Chat templates write these as JSON."""
    try:
        text = json.dumps(extras, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        keys = ", ".join(extras)
        raise BadRowError("unreadable_messages", f"message {number} holds {keys} that JSON cannot: {error}") from error
    _require_encodable(text, number)


def _require_encodable(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError("unencodable_text", f"message {number}: {error}") from error


def _text_of(content: Any, number: int) -> str:
    """The text of a content: a text, one ``{"type": "text", "text": ...}``, or a list of either, joined as they are."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRowError("null_content", f"message {number} has no content")
    if isinstance(content, list | tuple):
        return "".join(_text_of(part, number) for part in content)
    if isinstance(content, Mapping) and content.get("type", "text") in ("text", None) and "text" in content:
        return _text_of(content["text"], number)
    kind = content.get("type") if isinstance(content, Mapping) else type(content).__name__
    raise BadRowError("non_text_content", f"message {number} holds a part of type {kind!r}")

"""From the cells of a row to a prompt, before any token is counted.

In: cells as they are found in the wild: JSON text, Python literal text, bytes, lists, structs. Out: chat messages
``{"role", "content"}`` with text content, and ``PromptRow``; or a BadRowError that names what is wrong. Text is never
run as code. Which column holds what is the data set's business.
"""

import ast
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.dataset.parquet_files import Row

ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]
"""``role``, ``content`` and what else the row's message has: chat templates read names, tool calls, thoughts."""


class BadRowError(ValueError):
    """A row that cannot be used: ``reason`` is a short code to count by, ``detail`` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass
class PromptRow:
    """What a data set reads out of one row.

    Raises:
        BadRowError: with reason ``no_user_turn`` (the messages hold no question), or as ``mapping_of``.
    """

    messages: list[Message]
    ground_truth: Any = None
    style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)
    tools_kwargs: dict[str, Any] = field(init=False)
    """Options of the row's tools, by tool name."""

    def __post_init__(self) -> None:
        if not any(message["role"] == "user" for message in self.messages):
            raise BadRowError("no_user_turn", "the prompt holds no user message")
        self.tools_kwargs = mapping_of(self.extra_info.get("tools_kwargs"), "tools_kwargs")


def parse_messages(value: Any) -> list[Message]:
    """Read a ``messages`` cell: role names in lower case, contents joined to one text.

    Raises:
        BadRowError: with reason ``no_messages``, ``unreadable_messages``, ``unknown_role``, ``null_content``,
            ``non_text_content``, ``unencodable_text``, ``unreadable_tool_calls`` or ``blank_user_turn``.
    """
    try:
        in_columns = not isinstance(value, str | bytes)
        return [_parse_message(turn, number, in_columns) for number, turn in enumerate(_turns_of(value), 1)]
    except RecursionError as error:
        raise BadRowError("unreadable_messages", "nested too deeply") from error


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """Split off the assistant's message that ends a chat: its content is the ground truth, what came before the prompt.

    A chat that does not end with one is the prompt as it is, without ground truth.
    """
    is_answered = bool(messages) and messages[-1]["role"] == "assistant"
    return (messages[:-1], messages[-1]["content"]) if is_answered else (messages, None)


def mapping_of(value: Any, column: str) -> dict[str, Any]:
    """A cell that should hold a mapping: a struct, JSON text of an object, or nothing.

    The options of tools in a struct lose the nulls of their column, as the arguments of calls do in `parse_messages`.

    Raises:
        BadRowError: with reason ``unreadable_<column>``.
    """
    is_text = isinstance(value, str | bytes)
    try:
        if is_text:
            value = json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"unreadable_{column}", f"{column} is a text that is not JSON: {error}") from error
    if not isinstance(value, Mapping | None):
        raise BadRowError(f"unreadable_{column}", f"{column} is a {type(value).__name__}, not a mapping")
    if not is_text and value and "tools_kwargs" in value:
        value = {**value, "tools_kwargs": _without_nulls(value["tools_kwargs"])}
    return dict(value or {})


def lists_tools(row: Row) -> bool:
    """Whether the row's agent loop puts the tools into the prompt. Every loop does except ``single_turn_agent``."""
    return row.get("agent_name") != "single_turn_agent"


def text_of(cell: Any) -> str:
    """A cell for people to read: a text as it is, bytes decoded as far as they go, nothing as an empty text."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", errors="backslashreplace")
    return "" if cell is None else str(cell)


def _turns_of(value: Any) -> list[Any]:
    """The messages of a cell in any of its forms, each still as it is."""
    if isinstance(value, str | bytes):
        value = _parse_text(value)
    if isinstance(value, Mapping) and value:
        roles, contents = value.get("role"), value.get("content")
        # Some writers turn a list of messages into one mapping of two lists.
        if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
            return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return [value]
    if not isinstance(value, list | tuple | Mapping | None):
        raise BadRowError("unreadable_messages", f"a {type(value).__name__}, not a list of messages")
    if not value:
        raise BadRowError("no_messages", "the cell is empty")
    return list(value)


def _without_nulls(value: Any) -> Any:
    """A value of a struct column without the nulls of fields that it never had.

    A column has one type, so a struct in it has the fields of all others, as nulls: the arguments of a tool call would
    show those of every other tool.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _parse_text(text: str | bytes) -> Any:
    """The value of JSON or a Python literal; None of a blank text."""
    try:
        # Text exported on Windows may begin with a byte order mark.
        known = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise BadRowError("unreadable_messages", f"bytes that are not UTF-8: {error}") from error
    try:
        return json.loads(known) if known else None
    except (ValueError, RecursionError) as json_error:
        try:
            # Exports through CSV leave the repr() of a list; literal_eval runs nothing.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python about backslashes in the user's text
                return ast.literal_eval(known)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BadRowError("unreadable_messages", f"neither JSON nor a Python literal: {json_error}") from json_error


def _parse_message(turn: Any, number: int, in_columns: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRowError("unreadable_messages", f"message {number} is a {type(turn).__name__}, not a mapping")
    role = turn.get("role")
    role = role.lower() if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRowError("unknown_role", f"message {number} has the role {turn.get('role')!r}")
    extras = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
    if calls := _tool_calls(extras.pop("tool_calls", None), number, in_columns):
        extras["tool_calls"] = calls
    # A turn that only calls tools needs no content.
    text = _content_text("" if turn.get("content") is None and calls else turn.get("content"), number)
    try:
        # Chat templates may write the extras as JSON; a lone surrogate is in no tokenizer's alphabet.
        (text + json.dumps(extras, ensure_ascii=False, default=str)).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadRowError("unencodable_text", f"message {number}: {error}") from error
    if role == "user" and not text.strip():
        raise BadRowError("blank_user_turn", f"message {number} is blank")
    return {"role": role, "content": text, **extras}


def _tool_calls(cell: Any, number: int, in_columns: bool) -> list[Any]:
    """The tool calls of a message; BadRowError for an entry that is none, which a template would write unnoticed."""
    value = _parse_text(cell) if isinstance(cell, str | bytes) else _without_nulls(cell) if in_columns else cell
    calls = value if isinstance(value, list) else [value] if value else []
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            form = "{'function': {'name', 'arguments'}}"
            raise BadRowError("unreadable_tool_calls", f"message {number} has a call that is not {form}")
    return calls


def _content_text(content: Any, number: int) -> str:
    """The text of a content: a text, one ``{"type": "text", "text": ...}``, or a list of either, joined as they are."""
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRowError("null_content", f"message {number} has no content")
    if isinstance(content, list | tuple):
        return "".join(_content_text(part, number) for part in content)
    if isinstance(content, Mapping) and content.get("type", "text") in ("text", None) and "text" in content:
        return _content_text(content["text"], number)
    kind = content.get("type") if isinstance(content, Mapping) else type(content).__name__
    raise BadRowError("non_text_content", f"message {number} holds a part of type {kind!r}")

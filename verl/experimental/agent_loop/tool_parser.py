"""The calls that a model writes, in the Hermes syntax that Qwen uses: ``<tool_call>{JSON}</tool_call>``.

In: the text of one assistant turn. Out: its calls in order; for one that cannot be read, why, as a text that the model
can act on. Nothing that a model writes raises.

Tags inside a JSON text are part of it. Calls inside a thought (``<think>...</think>``) are no calls; the opening tag
may stand in the prompt, where some templates put it, so all before the last closing tag is thought. Read as well,
because models write it: several objects or a list in one tag, raw line breaks in a text, arguments as a JSON text, and
``parameters`` in their place.
"""

import json
import re
from typing import Any, NoReturn

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

CLOSE = "</tool_call>"
NOT_CLOSED = f"<tool_call> is not closed by {CLOSE}"
FORM = 'a tool call is {"name": ..., "arguments": {...}}'
_TAG = re.compile(r"<tool_call>|</?think>")
_STOP = re.compile(r"</?tool_call>|</think>")
_BETWEEN = re.compile(r"[\s,]*")


class ToolCall(BaseModel):
    """One call that can be read."""

    model_config = ConfigDict(populate_by_name=True)
    name: str
    arguments: dict[str, Any] = Field(default={}, validation_alias=AliasChoices("arguments", "parameters"))

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def parse_hermes_tool_calls(text: str) -> list[ToolCall | str]:
    """The calls of one assistant turn, in the order they were written; why, for one that cannot be read."""
    calls: list[ToolCall | str] = []
    place, in_thought = 0, False
    while tag := _TAG.search(text, place):
        place = tag.end()
        if tag.group() != "<tool_call>":
            in_thought = tag.group() == "<think>"
            calls = calls if in_thought else []
            continue
        found, place = _read_calls(text, place)
        calls += [] if in_thought else found
    return calls


def _read_calls(text: str, place: int) -> tuple[list[ToolCall | str], int]:
    """Calls after an opening tag, and where to read on."""
    calls: list[ToolCall | str] = []
    while True:
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
        if text.startswith(CLOSE, place):
            return calls or [f"{FORM}; this is empty"], place + len(CLOSE)
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            stop = _STOP.search(text, place)
            if stop is None or stop.group() != CLOSE:
                return [NOT_CLOSED], stop.start() if stop else len(text)
            is_xml = text.startswith("<function=", place)
            reason = "write it as JSON, not as XML" if is_xml else f"this is no JSON: {error}"
            return [f"{FORM}; {reason}"], stop.end()
        calls += [_call_of(entry) for entry in (value if isinstance(value, list) else [value])]


def _call_of(value: Any) -> ToolCall | str:
    try:
        return ToolCall.model_validate(value)
    except (ValidationError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
        where = ".".join(map(str, problem["loc"]))
        return f"{FORM}; {where or 'this'}: {problem['msg']}"

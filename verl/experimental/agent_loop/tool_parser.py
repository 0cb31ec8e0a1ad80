"""Tool calls in a model's text, in the Hermes syntax that Qwen uses: ``<tool_call>{JSON}</tool_call>``.

Text in, calls out, in the order they were written. A call that cannot be read is returned as well, with the reason:
the model is told what was wrong. What stands inside a thought (``<think>...</think>``) calls nothing.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call. ``error`` is empty, or says why the call cannot be read (``name`` and ``arguments`` are then void)."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_hermes_tool_calls(text: str) -> list[ToolCall]:
    """The calls of one assistant turn."""
    return [_read_call(match.group(1), closed=bool(match.group(2))) for match in _CALL.finditer(_outside_thought(text))]


def _outside_thought(text: str) -> str:
    # The opening tag may stand in the prompt, where the template puts it; the last closing tag is what counts.
    answer = text.rpartition("</think>")[2]
    return answer.partition("<think>")[0]


def _read_call(body: str, closed: bool) -> ToolCall:
    if not closed:
        return ToolCall(error="<tool_call> is not closed by </tool_call>")
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        return ToolCall(error=f"the tool call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(error='a tool call is a JSON object with a "name"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(error=f'"arguments" of {call["name"]} must be a JSON object')
    return ToolCall(name=call["name"], arguments=arguments)

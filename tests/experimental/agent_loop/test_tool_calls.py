"""Hermes tool calls in a model's text: what is read, and the errors of calls that cannot be read."""

import pytest

from verl.experimental.agent_loop.tool_calls import ToolCall, parse_hermes_tool_calls


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_calls_come_in_order_with_text_around_them() -> None:
    text = "First. " + call('{"name": "a", "arguments": {"item": "<s_a_3>"}}') + " and " + call('{"name": "b"}')
    assert parse_hermes_tool_calls(text) == [ToolCall("a", {"item": "<s_a_3>"}), ToolCall("b", {})]
    assert parse_hermes_tool_calls("The answer is 7.") == []


@pytest.mark.parametrize("thought", ["<think>\nI could {}\n</think>\n\n", "started in the prompt {}</think>"])
def test_a_thought_calls_nothing(thought: str) -> None:
    inner = call('{"name": "a"}')
    assert parse_hermes_tool_calls(thought.format(inner)) == []
    assert parse_hermes_tool_calls(thought.format(inner) + call('{"name": "b"}')) == [ToolCall("b")]
    assert parse_hermes_tool_calls("<think>\n" + inner) == [], "a thought without an end"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (call("{name: a}"), "not valid JSON"),
        (call('["a"]'), 'JSON object with a "name"'),
        (call('{"arguments": {}}'), 'JSON object with a "name"'),
        (call('{"name": "a", "arguments": "{}"}'), '"arguments" of a must be a JSON object'),
        ('<tool_call>{"name": "a"}', "not closed"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text: str, error: str) -> None:
    (found,) = parse_hermes_tool_calls(text)
    assert error in found.error

"""Hermes tool calls: what is read, and what is told of a call that cannot be read."""

import pytest

from verl.experimental.agent_loop.tool_parser import ToolCall, parse_hermes_tool_calls


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_calls_come_in_order_with_text_around_them() -> None:
    text = "First. " + call('{"name": "a", "arguments": {"x": 1}}') + " and " + call('{"name": "b"}')
    assert parse_hermes_tool_calls(text) == [ToolCall("a", {"x": 1}), ToolCall("b", {})]


def test_an_answer_without_a_call() -> None:
    assert parse_hermes_tool_calls("The answer is 7.") == []


@pytest.mark.parametrize("thought", ["<think>\nI could {}\n</think>\n\n", "started in the prompt {}</think>"])
def test_a_thought_calls_nothing(thought: str) -> None:
    inner = call('{"name": "a"}')
    assert parse_hermes_tool_calls(thought.format(inner)) == []
    assert parse_hermes_tool_calls(thought.format(inner) + call('{"name": "b"}')) == [ToolCall("b")]


def test_an_unclosed_thought_calls_nothing() -> None:
    assert parse_hermes_tool_calls("<think>\n" + call('{"name": "a"}')) == []


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


def test_text_of_extended_tokens_stays_in_the_arguments() -> None:
    (found,) = parse_hermes_tool_calls(call('{"name": "a", "arguments": {"item": "<s_a_3><s_b_1>"}}'))
    assert found.arguments == {"item": "<s_a_3><s_b_1>"}

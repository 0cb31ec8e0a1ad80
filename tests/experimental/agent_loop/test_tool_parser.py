"""Calls as models write them."""

import json

import pytest
from support.agent_loop_fakes import call

from verl.experimental.agent_loop.tool_parser import ToolCall, parse_hermes_tool_calls


def test_calls_come_in_order_with_text_around_them() -> None:
    text = "First. " + call("a", '{"item": "<s_a_3>"}') + " and " + call("b")
    assert parse_hermes_tool_calls(text) == [ToolCall(name="a", arguments={"item": "<s_a_3>"}), ToolCall(name="b")]
    assert parse_hermes_tool_calls('<tool_call>{"name": "b"}</tool_call>') == [ToolCall(name="b")]
    assert parse_hermes_tool_calls("The answer is 7.") == []


@pytest.mark.parametrize(
    "thought",
    ["<think>\nI could {}\n</think>\n\n", "started in the prompt {}</think>", "<think>a <tool_call> {{ {} </think>"],
)
def test_a_thought_calls_nothing(thought: str) -> None:
    assert parse_hermes_tool_calls(thought.format(call("a")) + call("b")) == [ToolCall(name="b")]
    assert parse_hermes_tool_calls("<think>\n" + call("a")) == [], "a thought without an end"


@pytest.mark.parametrize("tag", ["</tool_call>", "<tool_call>", "<think>", "</think>", "<think>x</think>"])
def test_tags_inside_an_argument_are_part_of_it(tag: str) -> None:
    arguments = {"text": f"before {tag} after"}
    text = call("write", json.dumps(arguments)) + call("b")
    assert parse_hermes_tool_calls(text) == [ToolCall(name="write", arguments=arguments), ToolCall(name="b")]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "a", "arguments": {"x": 1}} {"name": "b"}',
        '{"name": "a", "arguments": {"x": 1}},\n{"name": "b"}',
        '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]',
        '{"name": "a", "parameters": {"x": 1}}{"name": "b", "parameters": {}}',
        '{"name": "a", "arguments": "{\\"x\\": 1}"} {"name": "b", "arguments": "{}"}',
    ],
)
def test_habits_of_models_are_read(body: str) -> None:
    found = parse_hermes_tool_calls(f"<tool_call>{body}</tool_call>")
    assert found == [ToolCall(name="a", arguments={"x": 1}), ToolCall(name="b")]


def test_a_line_break_in_a_text_is_read() -> None:
    found = parse_hermes_tool_calls(call("write", '{"text": "one\ntwo"}'))
    assert found == [ToolCall(name="write", arguments={"text": "one\ntwo"})]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{name: a}</tool_call>", "this is no JSON: "),
        ("<tool_call></tool_call>", "this is empty"),
        ('<tool_call>{"arguments": {}}</tool_call>', "name: Field required"),
        ('<tool_call>"a"</tool_call>', "this: Input should be"),
        (call("a", "[1]"), "arguments: Input should be a valid dictionary"),
        (call("a", '"no object"'), "arguments: "),
        (call("a", '{"x": NaN}'), "NaN is no JSON"),
        (call("a", '{"x": ' + "1" * 5000 + "}"), "this is no JSON: "),
        (call("a", '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"), "this is no JSON: "),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "this is no JSON: "),
        ('<tool_call>{"name": "a"} and more</tool_call>', "this is no JSON: "),
        ("<tool_call><function=a><parameter=x>1</parameter></function></tool_call>", "as JSON, not as XML"),
        ('<tool_call>{"name": "a"}', "not closed"),
        ("<tool_call>" + "[" * 100_000, "not closed"),
    ],
)
def test_a_call_that_cannot_be_read_says_why_and_costs_no_other(text: str, error: str) -> None:
    [found] = parse_hermes_tool_calls(text)
    assert isinstance(found, str) and error in found
    if "not closed" not in error:
        assert parse_hermes_tool_calls(text + call("b"))[1:] == [ToolCall(name="b")]

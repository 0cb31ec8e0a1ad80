"""Reading `messages` cells: every form that occurs, and what is refused for which reason."""

import json

import pytest

from verl.utils.dataset.prompt_rows import BadRowError, parse_messages, split_answer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def text_part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        tuple(CHAT),
        json.dumps(CHAT),
        json.dumps(CHAT).encode(),
        str(CHAT),  # a Python literal, single quotes
        [{"role": "User", "content": text_part("Hi")}, {"role": "ASSISTANT", "content": [text_part("Hel"), "lo"]}],
        {"role": ["user", "assistant"], "content": ["Hi", "Hello"]},
        '  \n[{"role":"user","content":"Hi","x":[true,false,null,NaN]},{"role":"assistant","content":"Hello"}]',
    ],
)
def test_every_form_of_a_chat_reads_the_same(value):
    assert parse_messages(value) == CHAT


def test_json_escapes_are_decoded():
    # A surrogate pair, an escaped slash and an escaped newline: ast.literal_eval would get the first two wrong.
    cell = r'[{"role": "user", "content": "\ud83d\ude00 a\/b\nc"}]'
    assert parse_messages(cell)[0]["content"] == "\U0001f600 a/b\nc"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no_messages"),
        ("", "no_messages"),
        ("  ", "no_messages"),
        ("[]", "no_messages"),
        (b"\xff\xfe", "unreadable_messages"),
        ("[{", "unreadable_messages"),
        ("__import__('os').getcwd()", "unreadable_messages"),
        ("[" * 100_000, "unreadable_messages"),
        ('"just text"', "unreadable_messages"),
        (7, "unreadable_messages"),
        (["Hi"], "unreadable_messages"),
        ([{"role": None, "content": "Hi"}], "unknown_role"),
        ([{"content": "Hi"}], "unknown_role"),
        ([{"role": "developer", "content": "Hi"}], "unknown_role"),
        ([{"role": 1, "content": "Hi"}], "unknown_role"),
        ([{"role": "user", "content": None}], "null_content"),
        ([{"role": "user", "content": text_part(None)}], "null_content"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "non_text_content"),
        ([{"role": "user", "content": 3}], "non_text_content"),
        ([{"role": "user", "content": " \n"}], "blank_user_turn"),
        ([{"role": "user", "content": []}], "blank_user_turn"),
        (r'[{"role": "user", "content": "\ud83d"}]', "unencodable_text"),
    ],
)
def test_bad_cells_are_refused_with_a_reason(value, reason):
    with pytest.raises(BadRowError) as caught:
        parse_messages(value)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_tool_calls_survive_and_need_no_content():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    assert parse_messages([turn]) == [{"role": "assistant", "content": "", "tool_calls": calls}]


def test_the_answer_is_the_last_assistant_turn_and_the_history_stays():
    chat = parse_messages(
        [
            {"role": "system", "content": ""},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "a turn after the answer is no part of the prompt"},
        ]
    )
    prompt, answer = split_answer(chat)
    assert [message["content"] for message in prompt] == ["", "a", "b", "c"]
    assert answer == ""


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user"], "no_assistant_turn"),
        (["system", "user", "user"], "no_assistant_turn"),
        (["assistant", "user"], "no_user_turn"),
        (["system", "assistant"], "no_user_turn"),
    ],
)
def test_chats_that_cannot_be_split(roles, reason):
    with pytest.raises(BadRowError) as caught:
        split_answer([{"role": role, "content": "x"} for role in roles])
    assert caught.value.reason == reason

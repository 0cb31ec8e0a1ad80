"""Cells that hold anything at all, and what a column's one type makes of the calls in it."""

import json

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.dataset.prompt_rows import BadRowError, parse_messages

oddities = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
keys = st.sampled_from(["role", "content", "type", "text", "name", "tool_calls"])
anything = st.recursive(
    oddities, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(anything)
def test_whatever_a_cell_holds_is_a_chat_or_a_bad_row(value):
    for cell in (value, json.dumps(value), repr(value), repr(value).encode("utf-8", errors="surrogatepass")):
        try:
            messages = parse_messages(cell)
        except BadRowError as bad:
            assert bad.reason and bad.detail
        else:
            assert all(isinstance(message["content"], str) for message in messages)
            assert json.dumps(messages, ensure_ascii=False).encode("utf-8")


def calling(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_struct_columns_lend_no_arguments_to_other_calls():
    """Of a column whose type is the union of all arguments; a text has the nulls that somebody wrote."""
    chats = [[calling({"city": "Rome"})], [calling({"a": 1, "b": [2, None]})], [calling({"deep": {"x": 1}})]]
    table = pa.Table.from_pylist([{"messages": messages} for messages in chats]).to_pylist()
    assert table[0]["messages"][0]["tool_calls"][0]["function"]["arguments"]["a"] is None, "what the column made of it"
    for row, messages in zip(table, chats, strict=True):
        (read,) = parse_messages(row["messages"])
        assert read == {**messages[0], "content": ""}
    (read,) = parse_messages(json.dumps([calling({"city": None})]))
    assert read["tool_calls"][0]["function"]["arguments"] == {"city": None}

"""Rows as they are found in the wild, one by one, each with what becomes of it.

An outcome is the reason for which a row is dropped, or what is kept of it: the prompt, one "role: content" per message,
and the answer after "=>", joined by " | ". Cells that hold anything at all come last.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_files import read_jsonl

from verl.config import DataConfig
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.prompt_rows import BadRowError, parse_messages

HI = "user: Hi | => Hello"
ANSWER = '{"role": "assistant", "content": "Hello"}'
DEEP = 600
"""Nested lists: fewer than the JSON parser refuses, more than a recursive reader of Python's can take."""


def user(content: str) -> str:
    """A chat of one question, whose content is given as JSON, and its answer."""
    return f'[{{"role": "user", "content": {content}}}, {ANSWER}]'


def roles(names: str) -> str:
    """A chat of these roles whose contents are numbered from 1."""
    return json.dumps([{"role": name, "content": str(number)} for number, name in enumerate(names.split(), 1)])


def asked_by(role: str) -> str:
    """A chat whose question has this role, given as JSON."""
    return f'[{{"role": {role}, "content": "Hi"}}, {ANSWER}]'


TEXT_CELLS = [
    # name, cell, outcome
    ("text content", user('"Hi"'), HI),
    ("byte order mark", "\ufeff" + user('"Hi"'), HI),
    ("list of text parts", user('[{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]'), HI),
    ("nested lists", user('[[["H"]], ["i"]]'), HI),
    ("columns instead of rows", '{"role": ["user", "assistant"], "content": ["Hi", "Hello"]}', HI),
    ("Python literal", "[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]", HI),
    ("Python tuple", "({'role': 'user', 'content': ('H', 'i')}, " + ANSWER + ")", HI),
    ("a call is not run", "__import__('os').getcwd()", "unreadable_messages"),
    ("surrogate pair", user(r'"\ud83d\ude00"'), "user: 😀 | => Hello"),
    ("lone surrogate in the question", user(r'"\ud83d"'), "unencodable_text"),
    ("lone surrogate in a name", user(r'"Hi", "name": "\ud83d"'), "unencodable_text"),
    ("several turns", roles("user assistant user assistant"), "user: 1 | assistant: 2 | user: 3 | => 4"),
    ("a last question", roles("user assistant user"), "user: 1 | assistant: 2 | user: 3 | => None"),
    ("assistant alone", roles("assistant"), "no_user_turn"),
    ("role in another case", roles("System USER Assistant"), "system: 1 | user: 2 | => 3"),
    ("unknown role", asked_by('"developer"'), "unknown_role"),
    ("null role", asked_by("null"), "unknown_role"),
    ("another layout", '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]', "unknown_role"),
    ("blank question", user('" \\n\\t"'), "blank_user_turn"),
    ("blank answer", '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]', "user: Hi | => "),
    ("null content", user("null"), "null_content"),
    ("numeric content", user("3"), "non_text_content"),
    ("image part", user('[{"type": "image", "image": "cat.png"}, {"type": "text", "text": "Hi"}]'), "non_text_content"),
    ("empty part", user("{}"), "non_text_content"),
    ("null", None, "no_messages"),
    ("blank", " \n", "no_messages"),
    ("cut off", user('"Hi"')[:-20], "unreadable_messages"),
    ("a number", "42", "unreadable_messages"),
    ("JSON inside JSON", json.dumps(user('"Hi"')), "unreadable_messages"),
    ("huge nesting, closed", "[" * 100_000 + "]" * 100_000, "unreadable_messages"),
    ("deep content", user("[" * DEEP + '"Hi"' + "]" * DEEP), "unreadable_messages"),
    ("number of 5,000 digits", user('"Hi", "n": ' + "1" * 5000), "unreadable_messages"),
]

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CODED_MESSAGE = pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])


def not_utf8(in_lists: bool) -> pa.Array:
    """A text column of the bytes FF FE, or lists of messages with such a content; Arrow does not look."""
    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    if not in_lists:
        return texts
    messages = pa.StructArray.from_arrays([pa.array(["user"]), texts], ["role", "content"])
    return pa.ListArray.from_arrays([0, 1], messages)


TYPED_COLUMNS = [
    # name, column, an outcome per row
    ("lists", pa.array([CHAT, None, [], CHAT[:1]]), [HI, "no_messages", "no_messages", "user: Hi | => None"]),
    ("dictionary-encoded roles", pa.array([CHAT], pa.list_(CODED_MESSAGE)), [HI]),
    ("lists of texts", pa.array([["Hi", "Hello"]]), ["unreadable_messages"]),
    ("nothing but nulls", pa.nulls(2), ["no_messages", "no_messages"]),
    ("bytes", pa.array([json.dumps(CHAT).encode(), b"", b"\xff"]), [HI, "no_messages", "unreadable_messages"]),
    ("text that is not UTF-8", not_utf8(in_lists=False), ["unreadable_messages"]),
    ("lists of text that is not UTF-8", not_utf8(in_lists=True), ["unreadable_messages"]),
]

TEXT = json.dumps(CHAT)
SEGMENTS = '[{"type": "text", "text": "Once upon a time"}]'
OTHER_COLUMNS = [
    # name, row, outcome, source
    ("all columns", {"messages": TEXT, "source": "s", "uuid": "u", "metadata": '{"uid": 1}'}, HI, "s"),
    ("messages alone", {"messages": TEXT}, HI, "unknown"),
    ("verl's name of the source", {"messages": TEXT, "data_source": "v"}, HI, "v"),
    ("metadata that is not JSON", {"messages": TEXT, "metadata": "{"}, HI, "unknown"),
    ("plain text", {"messages": None, "segments": SEGMENTS, "source": "s"}, "plain_text", "s"),
    ("chat and plain text", {"messages": TEXT, "segments": SEGMENTS}, HI, "unknown"),
    ("neither", {"messages": None, "segments": None}, "no_messages", "unknown"),
]


def outcomes(folder, tokenizer):
    """What became of each row, by file and row number: an outcome and the source. The second load is from the cache."""
    config, record = DataConfig(max_prompt_length=10**6, max_dropped_fraction=1.0), folder / "dropped_rows.jsonl"
    loads = []
    for _ in range(2):
        dataset = OneRecDataset(folder, tokenizer, config, dropped_rows_path=record)
        found = {(line["file"], line["row"]): (line["reason"], line["source"]) for line in read_jsonl(record)}
        for entry in (dataset[place] for place in range(len(dataset))):
            path, row = dataset.location(entry["index"])
            prompt = [f"{message['role']}: {message['content']}" for message in entry["raw_prompt"]]
            outcome = " | ".join([*prompt, f"=> {entry['reward_model']['ground_truth']}"])
            assert isinstance(entry["uuid"], str)
            assert (str(path), row) not in found
            found[str(path), row] = (outcome, entry["source"])
        loads.append(found)
    assert loads[0] == loads[1]
    return {(path.rpartition("/")[2], row): outcome for (path, row), outcome in loads[0].items()}


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_text_cells_whatever_the_type_of_their_column(tokenizer, tmp_path, kind):
    cells = [cell for _, cell, _ in TEXT_CELLS]
    if kind == "dictionary":
        column = pa.array(cells).dictionary_encode()
    else:
        column = pa.array([cell and cell.encode() for cell in cells] if kind == "binary" else cells, kind)
    pq.write_table(pa.table({"messages": column}), tmp_path / "rows.parquet")
    found = outcomes(tmp_path, tokenizer)
    expected = {name: outcome for name, _, outcome in TEXT_CELLS}
    assert {name: found["rows.parquet", row][0] for row, name in enumerate(expected)} == expected
    assert len(found) == len(TEXT_CELLS)


def test_typed_columns_in_files_beside_each_other(tokenizer, tmp_path):
    for name, column, _ in TYPED_COLUMNS:
        pq.write_table(pa.table({"messages": column}), tmp_path / f"{name}.parquet")
    found = outcomes(tmp_path, tokenizer)
    for name, column, expected in TYPED_COLUMNS:
        assert [found.pop((f"{name}.parquet", row))[0] for row in range(len(column))] == expected, name
    assert not found


def test_other_columns_of_files_beside_each_other(tokenizer, tmp_path):
    for name, row, _, _ in OTHER_COLUMNS:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    found = outcomes(tmp_path, tokenizer)
    expected = {(f"{name}.parquet", 0): (outcome, source) for name, _, outcome, source in OTHER_COLUMNS}
    assert found == expected


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


def test_a_text_keeps_the_nulls_that_somebody_wrote():
    """Other than a struct, which has a null for every argument of other calls."""
    function = {"name": "weather", "arguments": {"city": None}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    assert parse_messages(json.dumps([turn])) == [turn]

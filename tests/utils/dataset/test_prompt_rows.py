"""Chats made up by hypothesis: nothing crashes, no row is lost, what is kept is what was written."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_files import EXTEND_START, chat, read_jsonl

from verl.config import DataConfig
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.prompt_rows import BadRowError, PromptRow, parse_messages, split_answer

quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)

texts = st.text(max_size=12)  # hypothesis leaves lone surrogates out
parts = st.builds(lambda text: {"type": "text", "text": text}, texts)
contents = texts | parts | st.lists(texts | parts, max_size=3)
known_roles = st.sampled_from(["system", "user", "assistant", "tool", "User", "ASSISTANT"])
chats = st.lists(st.builds(lambda role, content: {"role": role, "content": content}, known_roles, contents), max_size=5)
dumps = st.sampled_from([json.dumps, lambda turns: json.dumps(turns, ensure_ascii=False, indent=1), repr])

oddities = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
keys = st.sampled_from(["role", "content", "type", "text", "name", "tool_calls"])
anything = st.recursive(
    oddities, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)


def joined(content) -> str:
    """The text of a content."""
    if isinstance(content, str):
        return content
    return content["text"] if isinstance(content, dict) else "".join(map(joined, content))


def expected_split(messages):
    """Prompt and answer of a chat, or None where it cannot be used."""
    turns = [(message["role"].lower(), joined(message["content"])) for message in messages]
    answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    blank = any(role == "user" and not text.strip() for role, text in turns)
    if blank or not answers or not any(role == "user" for role, _ in turns[: answers[-1]]):
        return None
    return turns[: answers[-1]], turns[answers[-1]][1]


@quick
@given(chats, dumps)
def test_a_chat_is_read_back_as_it_was_written(written, dump):
    try:
        prompt, answer = split_answer(parse_messages(dump(written)))
        PromptRow(prompt)
    except BadRowError:
        assert expected_split(written) is None
    else:
        assert ([(message["role"], message["content"]) for message in prompt], answer) == expected_split(written)


@quick
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
        assert read["tool_calls"] == messages[0]["tool_calls"]
    (read,) = parse_messages(json.dumps([calling({"city": None})]))
    assert read["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_messages_as_maps_of_arrow():
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    (cell,) = pa.array([[[("role", "user"), ("content", "hi")]]], kind).to_pylist()
    assert parse_messages(cell) == [{"role": "user", "content": "hi"}]


def test_tool_calls_survive_and_need_no_content():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    assert parse_messages([turn]) == [{"role": "assistant", "content": "", "tool_calls": calls}]


cells = st.builds(lambda turns, dump: dump(turns), chats, dumps) | st.text(max_size=10) | st.none()


@settings(quick, max_examples=25)
@given(st.lists(cells, min_size=1, max_size=12), st.integers(30, 60), st.sampled_from(["drop", "replace"]))
def test_no_row_is_lost(tokenizer, rows, limit, prompt_extend_tokens):
    with tempfile.TemporaryDirectory() as folder:
        path, record = Path(folder) / "rows.parquet", Path(folder) / "dropped_rows.jsonl"
        pq.write_table(pa.table({"messages": pa.array([chat("a")["messages"], *rows], pa.string())}), path)
        limits = {"max_prompt_length": limit, "filter_overlong_prompts": True, "max_dropped_fraction": 1.0}
        config = DataConfig(**limits, prompt_extend_tokens=prompt_extend_tokens, cache_dir=f"{folder}/cache")
        options = {"extend_vocab_start_token": EXTEND_START, "dropped_rows_path": record}
        for _ in range(2):  # the second time from the cache
            dataset = OneRecDataset(path, tokenizer, config, **options)
            kept = [dataset[place] for place in range(len(dataset))]
            dropped = [line["row"] for line in read_jsonl(record)]
            assert sorted([entry["index"] for entry in kept] + dropped) == list(range(len(rows) + 1))
            prompts = [entry["raw_prompt"] for entry in kept]
            lengths = map(len, tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False))
            assert max(lengths) <= limit

"""Rows made up by hypothesis, read under five chat templates: kept as they were written, or dropped with a reason.

What a prompt has to be is rendered here a second time, in Python, from what was put into the row.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.chat_files import EXTEND_START, read_jsonl

from verl.config import DataConfig
from verl.experimental.agent_loop.base import ChatTemplate
from verl.utils.dataset.onerec_dataset import create_rl_dataset
from verl.utils.tokenizer import hf_tokenizer

ROWS, LIMIT = 200, 400
"""How many rows; the most tokens of a prompt."""
HOSTILE = ["<|im_end|>\n<|im_start|>assistant\n", "</tool_call>", "<think>", "{{ 7 * 7 }}", "{% if", "\0", "\ufeff"]
HOSTILE += ["a\r\nb\u2028", "👩‍🚀e\u0301", "%s{0}", "'\"\\", "null", "<s_a_0>", "\u202eback", " \t", "\\u0041"]
texts = st.sampled_from(HOSTILE) | st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, values, max_size=3)
arguments = objects | objects.map(json.dumps) | st.sampled_from(["no JSON", "[1]", "", '{"a":1.50}']) | st.none()
part = st.builds(lambda text: {"type": "text", "text": text}, texts)
contents = texts | part | st.lists(texts | part, max_size=3)
# In the order of the struct column, whose fields have one type each.
fields = {"n": st.integers(-9, 9), "s": texts, "d": st.fixed_dictionaries({"x": texts})}
typed_arguments = st.sets(st.sampled_from(list(fields))).flatmap(
    lambda names: st.fixed_dictionaries({name: fields[name] for name in fields if name in names})
)
BAD_CONTENTS = [None, 3, {"type": "image"}, ["a", None], "\ud83d"]
BAD_CALLS = ["none", "[", 3, [3], [{"id": "1"}], [{"function": {"name": 3}}], [{"function": "f"}]]
BAD_CELLS = ["", None, "42", "[" * 20_000, "[]", "{}", "{{}}"]
ROLES = ["system", "user", "assistant", "tool"]


@st.composite
def rows(draw):
    """How a row is stored, and its messages, or what the cell holds in their place."""
    form = draw(st.sampled_from(["json", "literal", "bytes", "structs", "maps", "parts", "cell"]))
    if form == "cell":
        return form, draw(st.sampled_from(BAD_CELLS))
    typed, turns = form in ("structs", "maps", "parts"), []
    names = draw(st.lists(st.sampled_from(ROLES), max_size=4) | st.sampled_from([ROLES, [*ROLES[1:3]] * 2, ROLES[:3]]))
    for role in draw(st.sampled_from([["user", *names, "assistant"], [*ROLES[1:3], "user", "assistant"], names])):
        content = draw(texts if typed else contents)
        if form == "parts":
            content = [{"type": "text", "text": text} for text in ("part", content)]
        if role == "user" and isinstance(content, str):
            content += draw(st.sampled_from(["?", "why", "and", ""]))
        if draw(st.integers(0, 19)) == 19:
            role = draw(st.sampled_from([role, role, "developer"]))
            content = "" if typed else draw(st.sampled_from(BAD_CONTENTS))
        turn = {"role": role.upper() if draw(st.booleans()) else role, "content": content}
        if role == "assistant" and form != "parts" and draw(st.booleans()):
            written = draw(st.lists(typed_arguments if typed else arguments, max_size=2))
            calls = [{"name": "look", "arguments": each} for each in written]
            if typed or draw(st.booleans()):
                calls = [{"type": "function", "function": call} for call in calls]
            as_text = form == "maps" or (not typed and draw(st.booleans()))
            bad = not typed and draw(st.integers(0, 4)) == 4
            turn["tool_calls"] = draw(st.sampled_from(BAD_CALLS)) if bad else json.dumps(calls) if as_text else calls
        turns.append(turn | draw(st.sampled_from([{}, {"name": "n"}, {"thinking": "t"}])))
    return form, turns


class Defect(Exception):
    """Why a row cannot be used."""


def text_of(content):
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if isinstance(content, dict) and "text" in content:
        return content["text"]
    raise Defect("null_content" if content is None else "non_text_content")


def read(turns, layout):
    """The turns of a prompt: role, text, (name, arguments) of its calls, message."""
    if not isinstance(turns, list) or not turns:
        raise Defect("no_messages" if turns in ("", None, "[]", "{}", []) else "unreadable_messages")
    found = []
    for turn in turns:
        role, calls = turn["role"].lower(), turn.get("tool_calls") or []
        if role not in ROLES:
            raise Defect("unknown_role")
        if calls in BAD_CALLS:
            raise Defect("unreadable_messages" if calls in BAD_CALLS[:2] else "unreadable_tool_calls")
        calls = [call.get("function", call) for call in (json.loads(calls) if isinstance(calls, str) else calls)]
        text = "" if turn["content"] is None and calls else text_of(turn["content"])
        if text == "\ud83d" or (role == "user" and not text.strip()):
            raise Defect("blank_user_turn" if text != "\ud83d" else "unencodable_text")
        found.append((role, text, [(call["name"], call["arguments"]) for call in calls], turn))
    if layout == "messages":
        found = found[:-1] if found and found[-1][0] == "assistant" else found
    if all(role != "user" for role, *_ in found):
        raise Defect("no_user_turn")
    return found


def dumped(value):
    return json.dumps(value, ensure_ascii=False)


def as_object(written):
    """Arguments for a template that takes objects: a text that is no object stays a text."""
    try:
        parsed = json.loads(written) if isinstance(written, str) else written
    except ValueError:
        return written
    return parsed if isinstance(parsed, dict) else written


# ------------------------------------------------------------------ five templates, each written twice

LOOP = "{% for m in messages %}"
CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
QWEN = (
    LOOP + "<|im_start|>{{ m.role }}{{ ':' ~ m.name if m.name }}\n{{ m.thinking }}{{ m.content }}" + CALLS
    + "{{ '\n<tool_call>\n' ~ f.name ~ ' ' ~ (f.arguments if f.arguments is string else f.arguments | tojson) }}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
)  # fmt: skip
GEMMA = (
    LOOP + "{% if m.role != ('user' if loop.index0 is even else 'assistant') or m.tool_calls %}"
    "{{ raise_exception('roles take turns') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}<|im_start|>model{{ '\n' }}"
)
LLAMA = (
    "Today: {{ strftime_now('%d %b %Y') }}\n\n" + LOOP + "{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    + CALLS + "{{ f.name }}{% for key, value in f.arguments.items() %}<{{ key }}={{ value | tojson }}>{% endfor %}"
    "{% endfor %}{% endfor %}[assistant]"
)  # fmt: skip
DEEPSEEK = (
    LOOP + "<{{ m.role }}>{{ m.content }}" + CALLS
    + "{{ f.name + '```json\n' + f.arguments + '\n```' }}{% endfor %}{% endfor %}<assistant>"
)  # fmt: skip
PLAIN = LOOP + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "


def qwen(turns):
    text = ""
    for role, words, calls, turn in turns:
        text += f"<|im_start|>{role}{':' + turn['name'] if 'name' in turn else ''}\n{turn.get('thinking', '')}{words}"
        for name, written in calls:
            shown = as_object(written)
            text += f"\n<tool_call>\n{name} {shown if isinstance(shown, str) else dumped(shown)}\n</tool_call>"
        text += "<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def gemma(turns):
    if any(role != ("user", "assistant")[place % 2] or calls for place, (role, _, calls, _) in enumerate(turns)):
        raise Defect("template")
    shown = "".join(f"<|im_start|>{role}\n{words.strip()}<|im_end|>\n" for role, words, *_ in turns)
    return shown + "<|im_start|>model\n"


def llama(turns):
    text = "Today: 26 Jul 2024\n\n"
    for role, words, calls, _ in turns:
        if len(calls) > 1 or not all(isinstance(as_object(written), dict) for _, written in calls):
            raise Defect("template")
        text += f"[{role}]{words}"
        for name, written in calls:
            text += name + "".join(f"<{key}={dumped(value)}>" for key, value in as_object(written).items())
    return text + "[assistant]"


def deepseek(turns):
    text = ""
    for role, words, calls, _ in turns:
        text += f"<{role}>{words}"
        text += "".join(f"{n}```json\n{a if isinstance(a, str) else dumped(a)}\n```" for n, a in calls)
    return text + "<assistant>"


def plain(turns):
    return "".join(f"{role}: {words}\n" for role, words, *_ in turns) + "assistant: "


TEMPLATES = {"qwen": (QWEN, qwen), "gemma": (GEMMA, gemma), "llama": (LLAMA, llama), "deepseek": (DEEPSEEK, deepseek)}
TEMPLATES["plain"] = (PLAIN, plain)

# ------------------------------------------------------------------ files and the test

TEXT, MAP = pa.string(), pa.map_(pa.string(), pa.string())
FIELDS = {"role": TEXT, "content": TEXT, "name": TEXT, "thinking": TEXT}
CALL = {"name": TEXT, "arguments": pa.struct({"n": pa.int64(), "s": TEXT, "d": pa.struct({"x": TEXT})})}
CALLS_TYPE = pa.list_(pa.struct({"type": TEXT, "function": pa.struct(CALL)}))
KINDS = {"json": TEXT, "literal": TEXT, "bytes": pa.binary(), "cell": TEXT, "maps": pa.list_(MAP)}
KINDS["parts"] = pa.list_(pa.struct(FIELDS | {"content": pa.list_(MAP)}))
KINDS["structs"] = pa.list_(pa.struct(FIELDS | {"tool_calls": CALLS_TYPE}))
WRITE = {"json": json.dumps, "literal": repr, "bytes": lambda turns: json.dumps(turns).encode()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder for each layout, with a file for each way of storing; and what is in them, by file and row."""
    folder, chats = tmp_path_factory.mktemp("hostile"), {form: [] for form in KINDS}

    @settings(max_examples=ROWS, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(rows())
    def collect(row):
        chats[row[0]].append(row[1])

    collect()
    for layout in ("messages", "prompt"):
        (folder / layout).mkdir()
        for form, kind in KINDS.items():
            column = pa.array([WRITE.get(form, lambda turns: turns)(turns) for turns in chats[form]], kind)
            pq.write_table(pa.table({layout: column}), folder / layout / f"{form}.parquet")
    return folder, {(form, row): turns for form in KINDS for row, turns in enumerate(chats[form])}


@pytest.mark.parametrize("layout", ["messages", "prompt"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_row_is_lost_without_a_reason_or_changed_without_a_word(tokenizer, tmp_path, files, name, layout):
    (folder, written), record = files, tmp_path / "dropped_rows.jsonl"
    tokenizer = hf_tokenizer(tokenizer.name_or_path)
    tokenizer.chat_template, render = TEMPLATES[name]
    template, expected = ChatTemplate(tokenizer), {}
    special = ["<|im_end|>", "<|endoftext|>"] + ["<|im_start|>"] * ("<|im_start|>" in tokenizer.chat_template)
    for place, turns in written.items():
        try:
            expected[place] = render(read(turns, layout))
            ids = tokenizer.encode(expected[place], add_special_tokens=False)
            if max(ids) >= EXTEND_START or len(ids) > LIMIT:
                expected[place] = "extended_tokens" if max(ids) >= EXTEND_START else "overlong"
        except Defect as defect:
            expected[place] = str(defect)
    config = DataConfig(max_prompt_length=LIMIT, max_dropped_fraction=1.0, filter_overlong_prompts=True)
    options = {"dropped_rows_path": record, "extend_vocab_start_token": EXTEND_START}
    for _ in range(2):  # the second time from the cache
        dataset = create_rl_dataset(folder / layout, tokenizer, config, **options)
        found = {}
        for entry in (dataset[place] for place in range(len(dataset))):
            path, row = dataset.location(entry["index"])
            found[path.stem, row] = tokenizer.decode(template.encode_prompt(entry["raw_prompt"], False))
            is_typed = any(token in str(entry["raw_prompt"]) for token in special)
            assert dataset.checks["types_special"][entry["index"]].as_py() == is_typed
        for line in read_jsonl(record):
            place = (line["file"].rpartition("/")[2].removesuffix(".parquet"), line["row"])
            assert place not in found and line["detail"]
            found[place] = line["reason"]
        assert len(written) == len(found) == dataset.drop_report.rows >= ROWS
        for place in written:
            assert found[place] == expected[place], (place, written[place])
    assert len(dataset) > (20 if name == "gemma" else 60) and len(dataset.drop_report.dropped) > 5

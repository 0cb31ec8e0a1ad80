"""The data report: what it counts, its page, and the line that a user's mistake gives."""

import io
import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chat_files import EXTEND_START, chat, write_rows

from verl.utils.dataset.data_report import main

LIMITS = ["--extend-vocab-start-token", str(EXTEND_START), "--max-prompt-length", "40"]


@pytest.fixture
def report(tmp_path, tiny_tokenizers, capsys):
    """What the command prints: six short rows, of these one with an item token and one that types the token that ends a
    turn, two long ones, and two without a chat."""
    rows = [chat(letter, f"answer to {letter}") for letter in ("a", "<|im_end|>", *"cde")] + [
        chat("<s_a_0>", source="items")
    ]
    rows += [chat("x" * 50, source="long"), chat("y" * 60, source="long")]
    rows += [chat(" ", source="blank"), chat("?", messages="?", source="blank")]
    data = write_rows(tmp_path / "d.parquet", rows)

    def run(*arguments):
        main(["--files", str(data), "--tokenizer", str(tiny_tokenizers[1]), *arguments])
        return capsys.readouterr().out

    return run


def test_the_threshold_may_come_from_the_teacher(report, tiny_tokenizers):
    found = json.loads(report("--extend-vocab-start-token", "auto", "--json", "--teacher", str(tiny_tokenizers[0])))
    assert found["dropped"]["extended_tokens"] == {"items": 1}


def test_json(report):
    found = json.loads(report(*LIMITS, "--json"))
    assert (found["rows"], found["kept"]) == (10, {"letters": 5})
    unusable = {"blank_user_turn": {"blank": 1}, "unreadable_messages": {"blank": 1}}
    assert found["dropped"] == {"overlong": {"long": 2}, "extended_tokens": {"items": 1}, **unusable}
    assert (found["with_extended_tokens"], found["counted_prompts"]) == (1, 8)
    lengths = found["prompt_tokens"]
    assert lengths["kept"]["p0"] == lengths["kept"]["p100"] == lengths["all"]["p50"]
    assert found["with_typed_special_tokens"] == 1
    assert lengths["all"]["p100"] - lengths["kept"]["p100"] == 59  # 60 letters y instead of one
    examples = found["examples"]
    expected = [(0, "answer to a"), (2, "answer to c"), (4, "answer to e")]
    assert [(each["row"], each["ground_truth"]) for each in examples] == expected
    assert examples[0]["prompt"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert examples[0]["tokens"] == lengths["kept"]["p50"]


def test_the_page(report, caplog):
    text = report(*LIMITS)
    assert text.startswith("kept 5 of 10 rows, dropped 2 overlong, 1 extended_tokens, ")
    assert "extended tokens: in 1 of 8 prompts" in text and "special tokens typed as text: in 1 of 8 prompts" in text
    assert "are typed in 1 prompts" in caplog.text and "letters, row 0 of d.parquet" in text
    assert r"  | '<|im_start|>user\na<|im_end" in text
    unlimited = report()
    assert unlimited.startswith("kept 8 of 10 rows") and "extended tokens: not counted" in unlimited


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"\u63a8\U0001f3ac"), ("gbk", r"推\U0001f3ac")])
def test_characters_that_the_terminal_lacks_are_escaped(tmp_path, tiny_tokenizers, monkeypatch, encoding, shown):
    data = write_rows(tmp_path / "d.parquet", [chat("推🎬", "é")])
    outputs = []
    for option in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        main(["--files", str(data), "--tokenizer", str(tiny_tokenizers[1]), *option])
        terminal.flush()
        outputs.append(terminal.buffer.getvalue().decode(encoding))
    assert shown in outputs[0] and "推🎬" in json.loads(outputs[1])["examples"][0]["prompt"]


def test_another_column_of_prompts(report, tmp_path):
    path = write_rows(tmp_path / "own.parquet", [{"chat": chat("q")["messages"]}])
    found = json.loads(report("--files", str(path), "--prompt-key", "chat", "--json"))
    assert (found["kept"], found["examples"][0]["prompt"].count("<|im_start|>")) == ({"unknown": 1}, 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "data file '{path}': no such file, folder with *.parquet or match"),
        ({"messages": pa.array([], pa.string())}, "{path}: there is not a single row"),
        ({"text": ["a"], "id": [1]}, "no column 'messages' in ['{path}'], which have id, text;"),
        (
            {"messages": ["?"]},
            "no usable row in {path}: dropped are 1 unreadable_messages; unreadable_messages, first: neither JSON nor",
        ),
    ],
)
def test_a_mistake_gives_one_line(report, tmp_path, columns, message):
    path = tmp_path / "mistake.parquet"
    if columns is not None:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(SystemExit, match=r"^error: " + re.escape(message.format(path=path)) + r"[^\n]*$"):
        report("--files", str(path))
    with pytest.raises(SystemExit, match="error: the tokenizer folder"):
        report("--tokenizer", str(tmp_path / "none"))


def test_the_data_set_as_a_command_is_the_report(tmp_path):
    command = [sys.executable, "-m", "verl.utils.dataset.onerec_dataset", "--tokenizer", str(tmp_path)]
    done = subprocess.run([*command, "--files", str(tmp_path / "none")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr[:7], done.stderr.count("\n")) == (1, "error: ", 1), done.stderr

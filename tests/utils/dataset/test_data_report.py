"""The data report: its figures, its screen, and the line that a user's mistake gives."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.utils.dataset.data_report import main, read_report, render


def chat(question, source):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer to {question}"}]
    return {"messages": json.dumps(messages), "source": source}


@pytest.fixture
def data(tmp_path):
    """Ten rows: six short ones, one of them with an extended token, two long ones, and two that hold no chat."""
    rows = [chat(letter, "letters") for letter in "abcde"] + [chat("<s_a_0>", "items")]
    rows += [chat("x" * 50, "long"), chat("y" * 60, "long"), chat(" ", "blank"), {"messages": "?", "source": "blank"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    return tmp_path / "d.parquet"


def test_figures(data, tiny_tokenizers):
    report = read_report([str(data)], str(tiny_tokenizers[1]), 329, 40)
    assert (report.rows, report.kept) == (10, {"letters": 5})
    assert report.dropped == {
        "overlong": {"long": 2},
        "extended_tokens": {"items": 1},
        "blank_user_turn": {"blank": 1},
        "unreadable_messages": {"blank": 1},
    }
    assert (report.with_extended_tokens, report.counted_prompts) == (1, 8)
    lengths = report.prompt_tokens
    assert lengths["kept"]["p0"] == lengths["kept"]["p100"] == lengths["all"]["p50"]
    assert lengths["all"]["p100"] - lengths["kept"]["p100"] == 59  # 60 letters y instead of one
    assert [(example.row, example.ground_truth) for example in report.examples] == [
        (0, "answer to a"),
        (2, "answer to c"),
        (4, "answer to e"),
    ]
    assert report.examples[0].prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert report.examples[0].tokens == lengths["kept"]["p50"]


def test_without_a_threshold_and_a_limit_nothing_is_left_out_for_its_tokens(data, tiny_tokenizers):
    report = read_report([str(data)], str(tiny_tokenizers[1]), None, None)
    assert report.kept == {"letters": 5, "long": 2, "items": 1}
    assert report.with_extended_tokens is None
    assert "not looked for" in render(report)


def test_the_screen(data, tiny_tokenizers):
    text = render(read_report([str(data)], str(tiny_tokenizers[1]), 329, 40))
    assert text.startswith("5 of 10 rows kept (50.0%), 5 dropped\n")
    for part in (
        "overlong                          2  long 2",
        "in 1 of 8 prompts (12.5%)",
        "example 1: letters, row 0 of d.parquet",
        "  | <|im_start|>user\n  | a<|im_end|>",
        "  = answer to a",
    ):
        assert part in text
    assert len(text.splitlines()) < 45
    assert max(map(len, text.splitlines()[3:])) <= 120


def test_the_command(data, tiny_tokenizers, repo):
    command = [sys.executable, "-m", "verl.utils.dataset.onerec_dataset", "--files", str(data)]
    command += ["--tokenizer", str(tiny_tokenizers[1]), "--extend-vocab-start-token", "329", "--json"]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(result.stdout)
    assert report["kept"] == {"letters": 5, "long": 2}
    assert len(report["examples"]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.parquet", None, "data file '{path}': no such file, folder or match"),
        ("empty.parquet", b"", "{path} cannot be read as parquet: it is empty (0 bytes)"),
        ("rows.csv", b"a,b\n", "{path} cannot be read as parquet: it is a CSV file; convert it to parquet"),
        ("cut.parquet", b"PAR1 and no end", "{path} cannot be read as parquet: its end is missing after"),
        ("none.parquet", {"messages": pa.array([], pa.string())}, "{path}: there is not a single row"),
        ("column.parquet", {"text": ["a"], "id": [1]}, "no column 'messages' in ['{path}'], which have id, text;"),
        ("bad.parquet", {"messages": ["?"]}, "no usable row in {path}: dropped are 1 unreadable_messages"),
        ("folder", "folder", "data file '{path}': the folder holds no *.parquet file"),
    ],
)
def test_a_mistake_gives_one_line(tmp_path, tiny_tokenizers, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    with pytest.raises(SystemExit) as caught:
        main(["--files", str(path), "--tokenizer", str(tiny_tokenizers[1])])
    assert str(caught.value).startswith("error: " + message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_limit_below_one_and_a_missing_tokenizer(data, tiny_tokenizers, tmp_path):
    with pytest.raises(SystemExit, match=r"error: data\.max_prompt_length=0 must be at least 1"):
        main(["--files", str(data), "--tokenizer", str(tiny_tokenizers[1]), "--max-prompt-length", "0"])
    with pytest.raises(SystemExit, match="error: the tokenizer folder"):
        main(["--files", str(data), "--tokenizer", str(tmp_path / "none")])

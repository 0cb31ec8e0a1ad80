"""Answers as JSON lines, and as HTML: text that stays text, and the colours of tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.utils.rollout_dump import answers_as_html, dump_answers, show_answers

LETTERS, TEXTS = "#abcdefghé", ["", "<b>", "&", "\"x'", "<|im_end|>"]
"""By id; 0 is padding."""


class TextTokenizer:
    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[token] for token in ids)


def test_rows_are_written_without_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {
        "prompts": [[0, 1], [2, 3]],
        "responses": [[4, 9, 0], [5, 0, 0]],
        "attention_mask": [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        "response_mask": [[1, 0, 0], [1, 0, 0]],
        "distill_special_token_mask": [[0, 1, 0], [0, 0, 0]],
        "token_level_scores": [[0.0, 1.5, 0.0], [0.0, 0.0, 0.0]],
    }
    arrays = {"uid": ["u0", "u1"], "data_source": ["math", "item"], "__num_turns__": [2, 4]}
    arrays["reward_model"] = [{"ground_truth": "d"}, None]
    reported = {"acc": np.bool_(True), "far": np.float32(0.5), "seen": np.arange(2), "input": "taken", "step": 3}
    arrays["reward_extra"] = [reported, {}]
    batch = DataProto.from_dict({key: torch.tensor(rows) for key, rows in tensors.items()}, arrays)
    dump_answers(tmp_path / "dump", 7, batch, TextTokenizer(LETTERS), [])
    path = tmp_path / "dump" / "7.jsonl"
    text = path.read_text(encoding="utf-8")
    assert "dé" in text, "readable, not escaped"
    first, second = map(json.loads, text.splitlines())
    texts = {"step": 7, "uid": "u0", "data_source": "math", "input": "a", "output": "dé", "gts": "d"}
    counts = {"response_tokens": 2, "trained_tokens": 1, "extend_tokens": 1, "num_turns": 2, "score": 1.5}
    assert first == texts | counts | {"acc": True, "far": 0.5, "seen": [0, 1]}
    assert (second["input"], second["output"], second["gts"]) == ("bc", "e", None)
    dump_answers(tmp_path / "dump", 7, batch[[0]], TextTokenizer(LETTERS), [])
    assert len(path.read_text().splitlines()) == 1, "a step that is run again replaces its file"
    dump_answers(
        path / "below_a_file", 7, batch, TextTokenizer(LETTERS), []
    )  # an error in the log, and the run goes on
    assert "the answers of step 7 are not in" in caplog.text
    caplog.clear()
    (tmp_path / "dump" / "7.tokens.parquet").unlink()
    (tmp_path / "dump" / "7.tokens.parquet").mkdir()
    dump_answers(tmp_path / "dump", 7, batch, TextTokenizer(LETTERS), [])
    assert "the answers of step 7 are not in" in caplog.text


def batch_of(**scores: list[list[float]]) -> DataProto:
    """Two answers, of four tokens and of one."""
    tensors = {
        "prompts": [[1], [2]],
        "responses": [[1, 2, 3, 4], [1, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "response_mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "distill_special_token_mask": [[0, 0, 0, 0], [0, 0, 0, 0]],
    }
    uids = {"uid": np.array(["val-0", "val-1"], dtype=object)}
    return DataProto.from_dict({key: torch.tensor(rows) for key, rows in (tensors | scores).items()}, uids)


def test_tokens_have_the_colour_of_student_less_teacher_and_markup_is_text() -> None:
    nan = float("nan")
    student = [[-1.0, -3.0, -1.0, -0.5], [-1.0, 0.0, 0.0, 0.0]]
    teacher = [[-2.0, -1.0, nan, -9.0], [-1.0, 0.0, 0.0, 0.0]]
    first, second = answers_as_html(batch_of(old_log_probs=student, ref_log_prob=teacher), TextTokenizer(TEXTS))
    spans = re.findall(r'<span style="background: rgba\((.*?)\)" title="(.*?)">(.*?)</span>', first)
    assert spans == [
        ("217, 72, 15, 0.16", "student -1.000, teacher -2.000", "&lt;b&gt;"),  # 0.65 x 1 / 4
        ("47, 125, 225, 0.33", "student -3.000, teacher -1.000", "&amp;"),
        ("217, 72, 15, 0.65", "student -0.500, teacher -9.000", "&lt;|im_end|&gt;"),  # beyond 4 nats
    ]
    assert "</span>&quot;x&#x27;<span" in first, "the teacher has no score of this one"
    assert ", 0.00)" in second and "<b>" not in first + second


def test_without_scores_there_are_no_colours_and_as_many_answers_as_asked_for() -> None:
    rows = show_answers(batch_of(), TextTokenizer(TEXTS), 1)
    assert [(row["uid"], row["output"]) for row in rows] == [("val-0", "<b>&\"x'<|im_end|>")]
    assert "&lt;b&gt;&amp;" in rows[0]["html"] and "span" not in rows[0]["html"]
    assert (
        len(show_answers(batch_of(), TextTokenizer(TEXTS), 9)) == 2
        and show_answers(batch_of(), TextTokenizer(TEXTS), 0) == []
    )

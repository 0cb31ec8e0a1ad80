"""Answers as HTML: text that stays text, and the colours of tokens."""

import re

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.answer_html import answers_as_html
from verl.utils.rollout_dump import show_answers

TEXTS = ["", "<b>", "&", "\"x'", "<|im_end|>"]


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(TEXTS[token] for token in ids)


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
    first, second = answers_as_html(batch_of(old_log_probs=student, ref_log_prob=teacher), Tokenizer())
    spans = re.findall(r'<span style="background: rgba\((.*?)\)" title="(.*?)">(.*?)</span>', first)
    assert spans == [
        ("217, 72, 15, 0.16", "student -1.000, teacher -2.000", "&lt;b&gt;"),  # 0.65 x 1 / 4
        ("47, 125, 225, 0.33", "student -3.000, teacher -1.000", "&amp;"),
        ("217, 72, 15, 0.65", "student -0.500, teacher -9.000", "&lt;|im_end|&gt;"),  # beyond 4 nats
    ]
    assert "</span>&quot;x&#x27;<span" in first, "the teacher has no score of this one"
    assert ", 0.00)" in second and "<b>" not in first + second


def test_without_scores_there_are_no_colours_and_as_many_answers_as_asked_for() -> None:
    rows = show_answers(batch_of(), Tokenizer(), 1)
    assert [(row["uid"], row["output"]) for row in rows] == [("val-0", "<b>&\"x'<|im_end|>")]
    assert "&lt;b&gt;&amp;" in rows[0]["html"] and "span" not in rows[0]["html"]
    assert len(show_answers(batch_of(), Tokenizer(), 9)) == 2 and show_answers(batch_of(), Tokenizer(), 0) == []

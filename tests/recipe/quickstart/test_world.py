"""The small world: right answers, files that read like anyone's, nothing of the test in the training, one seed."""

import json
import re
from collections import Counter
from random import Random

import pyarrow.parquet as pq
import pytest
from support.small_world import build_small_world

from recipe.onpolicy_distill.quickstart.general_tasks import LETTERS, TASKS, draw_problem
from recipe.onpolicy_distill.quickstart.tokenizers import ROLE_LINES
from recipe.onpolicy_distill.quickstart.world import FILES, QUESTION_WORDS
from verl.utils.tokenizer import hf_tokenizer


def rows_of(path):
    rows = pq.read_table(path).to_pylist()
    return [{**row, "messages": json.loads(row["messages"]), "metadata": json.loads(row["metadata"])} for row in rows]


def question_of(row):
    return row["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    solve = {
        "copy": str,
        "reverse": lambda text: "".join(reversed(text)),
        "upper": str.upper,
        "sort": lambda text: "".join(sorted(text)),
        "add": lambda text: f"{sum(int(term) for term in text.split('+')):02d}",
    }[task]
    for seed in range(50):
        question, answer = draw_problem(task, Random(seed))
        word, given = question.split(": ")
        assert (word, answer) == (task, solve(given))


def test_files_hold_chats_with_the_answer_last_and_items_of_the_catalogue(small_world):
    items = pq.read_table(small_world.catalogue).to_pylist()
    for item in items:
        assert item["text"] == f"<|sid_begin|><s_a_{item['a']}><s_b_{item['b']}><s_c_{item['c']}><|sid_end|>"
    assert sum(item["popularity"] for item in items) == 160 * 5  # four of the history and the target
    counts = {
        "general_test": {f"general_{task}": 5 for task in TASKS},
        "rec_train": {"rec_next": 160, "rec_caption": 40},
        "rec_test": {"rec_next": 20, "rec_caption": 5},
    }
    for name, sources in counts.items():
        rows = rows_of(getattr(small_world, name))
        assert Counter(row["source"] for row in rows) == sources
        assert len({row["uuid"] for row in rows}) == len(rows)
        for row in rows:
            answer, target = row["metadata"]["answer"], row["metadata"].get("target_item")
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert row["messages"][1]["content"] == [{"type": "text", "text": answer}]
            if target is not None:
                assert answer == items[target]["caption" if row["source"] == "rec_caption" else "text"]
            if row["source"] == "rec_next":
                history = "".join(items[number]["text"] for number in row["metadata"]["history"])
                assert question_of(row) == f"history: {history}"


def test_no_test_question_is_trained_on(small_world):
    for kind in ("general", "rec"):
        train, test = (rows_of(getattr(small_world, f"{kind}_{part}")) for part in ("train", "test"))
        asked = [question_of(row) for row in test if row["source"] != "rec_caption"]
        assert len(set(asked)) == len(asked)
        assert {question_of(row) for row in train}.isdisjoint(asked)


def test_tokenizers_share_ids_and_lose_nothing(small_world):
    teacher, student = hf_tokenizer(small_world.teacher_tokenizer), hf_tokenizer(small_world.student_tokenizer)
    assert len(teacher) == small_world.extend_vocab_start_token
    assert len(student) == len(teacher) + 3 * 4 + 2
    assert teacher.get_vocab().items() <= student.get_vocab().items()
    for row in rows_of(small_world.rec_test) + rows_of(small_world.general_test):
        text = student.apply_chat_template(row["messages"], tokenize=False)
        ids = student(text)["input_ids"]
        assert student.decode(ids) == text
        assert sum(token >= len(teacher) for token in ids) == text.count("<s_") + text.count("<|sid_")
    for word in (*ROLE_LINES, *(f"{word}:" for word in QUESTION_WORDS)):
        assert re.search(rf"[^{LETTERS}]", word, re.IGNORECASE), "a run of letters would read as a word"


def test_the_settings_decide_the_files(small_world, tmp_path):
    again, other = build_small_world(tmp_path), build_small_world(tmp_path, seed=1)
    assert again == build_small_world(tmp_path)
    assert len({world.folder.name for world in (small_world, again, other, build_small_world(tmp_path, items=20))}) == 3
    for name in FILES:
        first, same, different = (getattr(world, name).read_bytes() for world in (small_world, again, other))
        assert first == same != different

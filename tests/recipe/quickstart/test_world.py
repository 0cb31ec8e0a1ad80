"""The small world: right answers, files that read like anyone's, nothing of the test in the training, one seed."""

import json
import re
from collections import Counter
from random import Random

import pyarrow.parquet as pq
import pytest
from support.small_world import build_small_world

from recipe.onpolicy_distill.quickstart.catalogue import FIRST_SHARE, SECOND_SHARE, Catalogue, Item
from recipe.onpolicy_distill.quickstart.general_tasks import LETTERS, TASKS, draw_problem
from recipe.onpolicy_distill.quickstart.tokenizers import ROLE_LINES
from recipe.onpolicy_distill.quickstart.world import QUESTION_WORDS, WorldConfig
from verl.config import DataConfig
from verl.utils.dataset.items import item_tokens
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_small_world(tmp_path_factory.mktemp("world"))


def rows_of(path):
    return [
        {**row, "messages": json.loads(row["messages"]), "metadata": json.loads(row["metadata"])}
        for row in pq.read_table(path).to_pylist()
    ]


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
        assert word == task
        assert answer == solve(given)


def test_what_follows_an_item_is_likely_but_not_certain():
    catalogue = Catalogue(items=32, tastes=4, codes_per_level=4, random=Random(0))
    random = Random(1)
    following: dict[int, Counter[int]] = {item: Counter() for item in range(32)}
    for _ in range(4000):
        last, after = catalogue.draw_history(2, random)
        following[last][after] += 1
    shares = [
        [n / after.total() for _, n in after.most_common(2)] for after in following.values() if after.total() > 99
    ]
    assert len(shares) > 10
    first, second = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    assert FIRST_SHARE < first < FIRST_SHARE + 0.12  # more than its share: also drawn as a liked item
    assert SECOND_SHARE < second < SECOND_SHARE + 0.12


def test_a_history_keeps_to_tastes_but_for_the_second_successor():
    catalogue = Catalogue(items=32, tastes=4, codes_per_level=4, random=Random(0))
    history = catalogue.draw_history(400, Random(3))
    tastes = Counter(catalogue.items[item].taste for item in history)
    codes = {item.taste: item.codes[0] for item in catalogue.items}
    assert len(set(codes.values())) == 4
    assert all(item.codes[0] == codes[item.taste] for item in catalogue.items)
    assert len({item.text for item in catalogue.items}) == 32
    assert sum(n for _, n in tastes.most_common(2)) < 400  # or else the next item could be told from the taste alone


def test_files_hold_chats_with_the_answer_last(small):
    sizes = {"general_train": 200, "general_test": 25, "rec_train": 200, "rec_test": 25}
    for name, size in sizes.items():
        rows = rows_of(getattr(small, name))
        assert len(rows) == size
        assert len({row["uuid"] for row in rows}) == size
        for row in rows:
            user, assistant = row["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert assistant["content"] == [{"type": "text", "text": row["metadata"]["answer"]}]
    assert Counter(row["source"] for row in rows_of(small.general_test)) == {f"general_{task}": 5 for task in TASKS}
    assert Counter(row["source"] for row in rows_of(small.rec_train)) == {"rec_next": 160, "rec_caption": 40}
    assert Counter(row["source"] for row in rows_of(small.rec_test)) == {"rec_next": 20, "rec_caption": 5}


def test_no_test_question_is_trained_on(small):
    for train, test in ((small.general_train, small.general_test), (small.rec_train, small.rec_test)):
        asked = [question_of(row) for row in rows_of(test) if row["source"] != "rec_caption"]
        trained = {question_of(row) for row in rows_of(train)}
        assert len(set(asked)) == len(asked)
        assert trained.isdisjoint(asked)


def test_target_items_are_those_of_the_catalogue(small):
    items = pq.read_table(small.catalogue).to_pylist()
    assert [item["item"] for item in items] == list(range(16))
    for item in items:
        codes = f"<s_a_{item['a']}><s_b_{item['b']}><s_c_{item['c']}>"
        assert item["text"] == f"<|sid_begin|>{codes}<|sid_end|>"
    for row in rows_of(small.rec_test):
        target = items[row["metadata"]["target_item"]]
        assert row["metadata"]["answer"] == target["caption" if row["source"] == "rec_caption" else "text"]
        if row["source"] == "rec_next":
            history = "".join(items[number]["text"] for number in row["metadata"]["history"])
            assert question_of(row) == f"history: {history}"
    assert sum(item["popularity"] for item in items) == 160 * 5  # four of the history and the target


@pytest.mark.parametrize(("name", "start"), [("general_train", 110), ("general_test", 110), ("rec_test", None)])
def test_the_data_set_reads_every_row(small, name, start):
    assert start in (None, small.extend_vocab_start_token)  # with it, prompts that hold item tokens would be dropped
    tokenizer, rows = hf_tokenizer(small.student_tokenizer), rows_of(getattr(small, name))
    dataset = OneRecDataset(getattr(small, name), tokenizer, DataConfig(), extend_vocab_start_token=start)
    assert len(dataset) == len(rows)
    assert dataset[0]["reward_model"]["ground_truth"] == rows[0]["metadata"]["answer"]
    assert dataset[0]["extra_info"] == rows[0]["metadata"]


def test_tokenizers_share_ids_and_lose_nothing(small):
    teacher, student = hf_tokenizer(small.teacher_tokenizer), hf_tokenizer(small.student_tokenizer)
    assert len(teacher) == small.extend_vocab_start_token
    assert len(student) == len(teacher) + 3 * 4 + 2
    assert teacher.get_vocab().items() <= student.get_vocab().items()
    for row in rows_of(small.rec_test) + rows_of(small.general_test):
        text = student.apply_chat_template(row["messages"], tokenize=False)
        ids = student(text)["input_ids"]
        assert student.decode(ids) == text
        assert student.unk_token_id is None or student.unk_token_id not in ids
        extended = sum(token >= len(teacher) for token in ids)
        assert extended == text.count("<s_") + text.count("<|sid_")


def test_no_run_of_letters_reads_as_a_word():
    for word in (*ROLE_LINES, *(f"{word}:" for word in QUESTION_WORDS)):
        assert re.search(rf"[^{LETTERS}]", word, re.IGNORECASE)


def test_the_settings_decide_the_files(tmp_path):
    first, again = build_small_world(tmp_path), build_small_world(tmp_path)
    elsewhere = build_small_world(tmp_path / "elsewhere")
    assert first == again
    others = [build_small_world(tmp_path, **change) for change in ({"seed": 1}, {"items": 20}, {"general_train": 201})]
    assert len({world.folder for world in (first, *others)}) == 4
    names = ("general_train", "general_test", "rec_train", "rec_test", "catalogue")
    for name in names:
        contents = [getattr(world, name).read_bytes() for world in (first, elsewhere, others[0])]
        assert contents[0] == contents[1]
        assert contents[0] != contents[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": 130}, "items 130 must be a multiple of tastes 8"),
        ({"items": 1024}, "at most tastes x codes_per_level² = 512"),
        ({"tastes": 9}, "tastes 9 must lie between 2 and codes_per_level 8"),
        ({"general_test": 24}, "general_test 24 must be a multiple of the 5 tasks"),
        ({"test_users": 0}, "test_users 0 must be at least 1"),
        ({"caption_share": 1.0}, "caption_share 1.0 must be"),
        ({"test_captions": 200}, "test_captions 200 must lie between 0 and items 128"),
    ],
)
def test_bad_sizes(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WorldConfig(**settings)


def test_items_are_written_as_everywhere_else() -> None:
    assert Item(0, (3, 7, 1), "abc").text == "".join(item_tokens((3, 7, 1)))

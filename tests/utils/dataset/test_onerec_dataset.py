"""OneRecDataset on files written here, row by row, and on real files where they are at hand."""

import json
import logging
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config import DataConfig
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tokenizer import hf_tokenizer

EXTEND_START = 329


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizers):
    tokenizer = hf_tokenizer(tiny_tokenizers[1])
    assert tokenizer.convert_tokens_to_ids("<s_a_0>") == EXTEND_START
    return tokenizer


def chat(question, answer="Yes.", **row):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"source": "letters", "uuid": f"id-{question}", "messages": json.dumps(messages), **row}


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prompts_of(dataset):
    return [entry["raw_prompt"][-1]["content"] for entry in (dataset[i] for i in range(len(dataset)))]


def test_an_item_and_its_batch(tokenizer, tmp_path):
    rows = [
        chat("a", "A", metadata='{"uid": 7, "label": 1}', source="upper"),
        chat("b", "B", metadata=None, uuid=None),
    ]
    dataset = OneRecDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig())
    assert dataset[0] == {
        "raw_prompt": [{"role": "user", "content": "a"}],
        "data_source": "upper",
        "source": "upper",
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "uuid": "id-a",
        "index": 0,
        "has_extended": False,
        "extra_info": {"uid": 7, "label": 1},
        "tools_kwargs": {},
    }
    assert dataset[1]["uuid"] == dataset[1]["uuid"]  # made from file and row, so the same each time
    batch = collate_fn([dataset[0], dataset[1]])
    assert {key: column.shape for key, column in batch.items()} == dict.fromkeys(dataset[0], (2,))
    assert batch["raw_prompt"][1] == [{"role": "user", "content": "b"}]


def test_bad_rows_are_counted_and_recorded(tokenizer, tmp_path, caplog):
    rows = [
        chat("a", segments=None),
        {**chat("b"), "messages": None},
        {**chat("c"), "messages": None, "segments": '[{"type": "text", "text": "plain"}]'},
        {**chat("d"), "messages": "[{"},
        chat(" "),
        {**chat("e"), "messages": r'[{"role": "user", "content": "\ud83d"}]'},
        chat("f", source="other"),
    ]
    record = tmp_path / "run" / "dropped.jsonl"
    with caplog.at_level(logging.INFO):
        dataset = OneRecDataset(
            write(tmp_path / "d.parquet", rows),
            tokenizer,
            DataConfig(max_prompt_length=64, max_dropped_fraction=0.8),
            dropped_rows_path=record,
        )
    assert prompts_of(dataset) == ["a", "f"]
    assert [dataset[i]["index"] for i in range(2)] == [0, 6]
    assert dataset.ledger.kept == {"letters": 1, "other": 1}
    assert len(dataset) + dataset.ledger.dropped.total() == len(rows)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (1, "no_messages"),
        (2, "plain_text"),
        (3, "unreadable_messages"),
        (4, "blank_user_turn"),
        (5, "unencodable_text"),
    ]
    assert lines[2]["text"] == "[{"
    assert lines[2]["uuid"] == "id-d"
    assert "kept 2 of 7 rows" in caplog.text
    assert "dropped 1: plain_text (letters 1)" in caplog.text


def test_on_bad_row_error_names_file_and_row(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat("a"), {**chat("b"), "messages": "oops"}])
    with pytest.raises(ValueError, match=r"d\.parquet, row 1: .*unreadable_messages.*data\.on_bad_row=drop"):
        OneRecDataset(path, tokenizer, DataConfig(on_bad_row="error"))


def test_overlong_prompts_are_filtered_exactly_at_the_limit(tokenizer, tmp_path):
    questions = ["x" * n for n in range(1, 9)]
    path = write(tmp_path / "d.parquet", [chat(question) for question in questions])
    message = [{"role": "user", "content": "xxxx"}]
    limit = len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    dataset = OneRecDataset(path, tokenizer, DataConfig(max_prompt_length=limit, filter_overlong_prompts=True))
    assert prompts_of(dataset) == questions[:4]
    assert dataset.ledger.dropped == {"overlong": 4}
    with pytest.raises(ValueError, match=rf"row 4: {limit + 1} tokens, data.max_prompt_length={limit}"):
        OneRecDataset(path, tokenizer, DataConfig(max_prompt_length=limit))


def test_a_prompt_that_fits_without_its_think_switch_alone_is_overlong(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat("x"), chat("x" * 30)])
    message = [{"role": "user", "content": "x" * 30}]
    limit = len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    kept = {}
    for think in (False, True):
        config = DataConfig(max_prompt_length=limit, filter_overlong_prompts=True, enable_think=think)
        kept[think] = len(OneRecDataset(path, tokenizer, config))
    assert kept == {False: 2, True: 1}


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_truncation_gives_ids_for_the_prompts_it_cuts(tokenizer, tmp_path, side):
    path = write(tmp_path / "d.parquet", [chat("x"), chat("x" * 50)])
    dataset = OneRecDataset(path, tokenizer, DataConfig(max_prompt_length=20, truncation=side))
    whole = tokenizer.apply_chat_template(dataset[1]["raw_prompt"], add_generation_prompt=True, return_dict=False)
    expected = {"left": whole[-20:], "right": whole[:20], "middle": whole[:10] + whole[-10:]}[side]
    assert dataset[0]["prompt_ids"] is None
    assert dataset[1]["prompt_ids"] == expected


def test_prompts_with_extended_tokens(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat("a"), chat("<s_a_0>", "b"), chat("c", "<s_a_0>")])

    def load(extend_start=EXTEND_START, **settings):
        return OneRecDataset(path, tokenizer, DataConfig(**settings), extend_vocab_start_token=extend_start)

    assert prompts_of(load()) == ["a", "c"]  # an answer may hold them
    assert load().ledger.dropped == {"extended_tokens": 1}
    assert len(load(prompt_extend_tokens="replace")) == 3
    assert len(load(extend_start=None)) == 3
    assert len(load(extend_start=EXTEND_START + 1)) == 3
    with pytest.raises(ValueError, match=r"row 1: the prompt holds 1 ids from 329 on.*prompt_extend_tokens"):
        load(prompt_extend_tokens="error")


def test_sources_whose_teacher_reads_item_tokens_keep_them(tokenizer, tmp_path):
    rows = [chat("<s_a_0>", source=source) for source in ("rec_next", "recipes", "letters")]
    path = write(tmp_path / "d.parquet", rows)
    dataset = OneRecDataset(
        path, tokenizer, DataConfig(), extend_vocab_start_token=EXTEND_START, extended_sources=["rec_*", "l?tters"]
    )
    assert dataset.sources == ["rec_next", "letters"]
    assert dataset.ledger.dropped == {"extended_tokens": 1}


def test_prompts_say_whether_they_hold_item_tokens(tokenizer, tmp_path):
    rows = [chat("a"), {"source": "empty"}, chat("<s_a_0>"), chat("b <s_b_1> <s_c_7>"), chat("c", "<s_a_0>")]
    path = write(tmp_path / "d.parquet", rows)
    config = DataConfig(prompt_extend_tokens="replace")
    dataset = OneRecDataset(path, tokenizer, config, extend_vocab_start_token=EXTEND_START)
    assert dataset.has_extended == [item["has_extended"] for item in dataset] == [False, True, True, False]
    assert OneRecDataset(path, tokenizer, config).has_extended == [False] * 4


def test_think_draws_change_with_the_epoch_and_come_back(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat(f"q{n}") for n in range(30)])
    dataset = OneRecDataset(path, tokenizer, DataConfig(enable_think=True))
    first = prompts_of(dataset)
    dataset.set_epoch(1)
    assert prompts_of(dataset) != first
    dataset.set_epoch(0)
    assert prompts_of(dataset) == first
    assert Counter(prompt.partition(" ")[2] for prompt in first).keys() == {"", "/think", "/no_think"}


def test_several_files_and_max_samples(tokenizer, tmp_path):
    write(tmp_path / "1.parquet", [chat("a"), chat("b")])
    write(tmp_path / "2.parquet", [{key: value for key, value in chat("c").items() if key != "uuid"}])
    assert prompts_of(OneRecDataset(str(tmp_path), tokenizer, DataConfig())) == ["a", "b", "c"]
    assert prompts_of(OneRecDataset(str(tmp_path), tokenizer, DataConfig(), max_samples=2)) == ["a", "b"]


def test_list_and_struct_columns(tokenizer, tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": None}]
    messages[1]["content"] = [{"type": "text", "text": "b"}]
    path = write(tmp_path / "d.parquet", [{"source": "s", "messages": messages}])
    dataset = OneRecDataset(path, tokenizer, DataConfig())
    assert dataset[0]["reward_model"]["ground_truth"] == "b"


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{"text": "a"}], {}, "no column 'messages'"),
        ([{"messages": "[]", "source": "s"}], {}, "no usable row"),
        ([chat("a")], {"data_source_key": "task"}, "data.data_source_key='task' names no column"),
    ],
)
def test_unusable_files_give_a_clear_error(tokenizer, tmp_path, rows, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        OneRecDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig(**config))
    assert "d.parquet" in str(caught.value)


def test_a_run_that_loses_too_much_stops(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat("a"), chat("b"), chat(" "), {**chat("c"), "messages": "?"}])
    record = tmp_path / "dropped_rows.jsonl"
    assert len(OneRecDataset(path, tokenizer, DataConfig())) == 2  # just half of them
    with pytest.raises(ValueError, match=r"50\.0% of the 4 rows") as caught:
        OneRecDataset(path, tokenizer, DataConfig(max_dropped_fraction=0.49), dropped_rows_path=record)
    message = str(caught.value)
    assert "1 blank_user_turn, 1 unreadable_messages" in message
    assert "more than data.max_dropped_fraction=0.49" in message
    assert message.endswith(f"each dropped row is in {record}")
    assert "\n" not in message
    assert len(record.read_text().splitlines()) == 2  # written all the same
    with pytest.raises(ValueError, match=r"data\.max_dropped_fraction=1\.5 must be at most 1"):
        DataConfig(max_dropped_fraction=1.5)


def test_reasons_are_counted_by_source(tokenizer, tmp_path):
    rows = [chat("a"), chat(" ", source="x"), chat(" ", source="y"), chat("", source="y"), chat("b"), chat("c")]
    ledger = OneRecDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig()).ledger
    assert ledger.dropped_by_source == {("blank_user_turn", "y"): 2, ("blank_user_turn", "x"): 1}
    assert "dropped 3: blank_user_turn (y 2, x 1)" in ledger.summary()


def test_duplicate_uuids_are_rows_of_their_own(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat(question, uuid="same") for question in "abc"])
    dataset = OneRecDataset(path, tokenizer, DataConfig(enable_think=True))
    assert [dataset[place]["index"] for place in range(3)] == [0, 1, 2]
    assert {dataset[place]["uuid"] for place in range(3)} == {"same"}


class CountingTokenizer:
    """Counts the calls of another tokenizer's chat template."""

    def __init__(self, tokenizer, monkeypatch):
        self.prompts = 0
        apply = tokenizer.apply_chat_template

        def counted(conversations, **options):
            self.prompts += len(conversations)
            return apply(conversations, **options)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counted)


def test_the_second_load_reads_what_the_first_found_out(tiny_tokenizers, tmp_path, monkeypatch):
    tokenizer = hf_tokenizer(tiny_tokenizers[1])
    counter = CountingTokenizer(tokenizer, monkeypatch)
    rows = [chat("a"), chat(" "), chat("<s_a_0>"), chat("x" * 60), chat("b")]
    path = write(tmp_path / "d.parquet", rows)
    base = {"max_prompt_length": 40, "filter_overlong_prompts": True, "max_dropped_fraction": 0.8}

    def load(files=path, extend_start=EXTEND_START, max_samples=-1, **settings):
        counter.prompts = 0
        record = tmp_path / "dropped_rows.jsonl"
        dataset = OneRecDataset(
            files,
            tokenizer,
            DataConfig(**{**base, **settings}),
            extend_vocab_start_token=extend_start,
            dropped_rows_path=record,
            max_samples=max_samples,
        )
        return counter.prompts, prompts_of(dataset), [json.loads(line) for line in record.read_text().splitlines()]

    prompts, kept, dropped = load()
    assert (prompts, kept) == (4, ["a", "b"])
    assert [(line["row"], line["reason"]) for line in dropped] == [
        (1, "blank_user_turn"),
        (2, "extended_tokens"),
        (3, "overlong"),
    ]
    assert load() == (0, kept, dropped)
    assert load(max_dropped_fraction=0.6, seed=5, train_batch_size=7) == (0, kept, dropped)
    moved = write(tmp_path / "moved.parquet", rows)
    again, _, lines = load(moved)
    assert again == 0
    assert [line["file"] for line in lines] == [str(moved)] * 3
    for change in (
        {"max_prompt_length": 41},
        {"extend_start": EXTEND_START + 1},
        {"prompt_extend_tokens": "replace"},
        {"enable_think": True},
        {"enable_think": True, "think_mode": "force_think"},
        {"apply_chat_template_kwargs": {"enable_thinking": False}},
        {"max_samples": 1},
        {"data_source_key": "data_source"},
    ):
        assert load(**change)[0] > 0, change
        assert load(**change)[0] == 0, change
    assert load(write(tmp_path / "d.parquet", [*rows, chat("c")]))[0] == 5
    tokenizer.chat_template = tokenizer.chat_template + "{# another #}"
    assert load()[0] == 5
    tokenizer.add_tokens(["another"])
    assert load()[0] == 5


def test_settings_that_stop_at_a_row_do_so_on_cached_rows_too(tokenizer, tmp_path):
    path = write(tmp_path / "d.parquet", [chat("a"), chat(" "), chat("b"), chat("<s_a_0>")])
    assert len(OneRecDataset(path, tokenizer, DataConfig(), extend_vocab_start_token=EXTEND_START)) == 2
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row 1: .*data\.on_bad_row=drop"):
            OneRecDataset(path, tokenizer, DataConfig(on_bad_row="error"), extend_vocab_start_token=EXTEND_START)
        with pytest.raises(ValueError, match=r"row 3: .*data\.prompt_extend_tokens=drop"):
            OneRecDataset(
                path, tokenizer, DataConfig(prompt_extend_tokens="error"), extend_vocab_start_token=EXTEND_START
            )


def test_what_a_class_of_ones_own_finds_is_not_kept(tokenizer, tmp_path):
    class Shouting(OneRecDataset):
        reads = 0

        def read_prompt(self, row):
            Shouting.reads += 1
            return super().read_prompt(row)

    path = write(tmp_path / "d.parquet", [chat("a"), chat("b")])
    for reads in (2, 4):
        Shouting(path, tokenizer, DataConfig())
        assert Shouting.reads == reads


def test_rows_are_in_order_over_many_blocks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("verl.utils.dataset.row_facts.CHARACTERS_PER_BLOCK", 40)
    rows = [chat(f"q{number}" if number % 7 else " ") for number in range(700)]
    dataset = OneRecDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig())
    assert prompts_of(dataset) == [f"q{number}" for number in range(700) if number % 7]
    assert dataset.ledger.dropped == {"blank_user_turn": 100}


REAL_FILES = [
    # files, threshold, limit, kept by source, dropped by reason: 2,000 and 25,621 rows
    (
        "*.parquet",
        None,
        1024,
        {
            "gsm8k_train": 800,
            "svamp": 200,
            "OnlineRetail_NextBasket": 600,
            "OnlineRetail_LabelPred": 150,
            "OnlineRetail_ItemUnderstand": 150,
            "OnlineRetail_Interactive": 100,
        },
        {},
    ),
    ("*.parquet", 8218, 256, {"gsm8k_train": 800, "svamp": 200}, {"extended_tokens": 1000}),
    ("*.parquet", 8218, 128, {"gsm8k_train": 652, "svamp": 200}, {"extended_tokens": 1000, "overlong": 148}),
    (
        "train",
        8218,
        256,
        {"gsm8k_train": 7467, "svamp": 700},
        {"extended_tokens": 14934, "plain_text": 2514, "overlong": 6},
    ),
    ("train/sft_general.parquet", 8218, 128, {"gsm8k_train": 5965, "svamp": 700}, {"overlong": 1508}),
]


@pytest.mark.parametrize(("files", "start", "limit", "kept", "dropped"), REAL_FILES)
def test_real_files(shared_data, files, start, limit, kept, dropped):
    tokenizer = hf_tokenizer(shared_data / "tokenizer" / "mini8k-item256")
    config = DataConfig(max_prompt_length=limit, filter_overlong_prompts=True, max_dropped_fraction=0.7)
    dataset = OneRecDataset(shared_data / "onerec" / files, tokenizer, config, extend_vocab_start_token=start)
    assert dataset.ledger.kept == kept
    assert dataset.ledger.dropped == dropped
    assert len(dataset) == sum(kept.values())
    assert dataset.ledger.rows == (2000 if files == "*.parquet" else 8173 if "general" in files else 25621)


def test_the_benchmarks_files_hold_no_answers_to_train_on(shared_data):
    tokenizer = hf_tokenizer(shared_data / "tokenizer" / "mini8k-item256")
    with pytest.raises(ValueError, match=r"no usable row in .*eval.*270 no_assistant_turn"):
        OneRecDataset(shared_data / "onerec" / "eval", tokenizer, DataConfig(max_prompt_length=4096))

"""OneRecDataset on files written here, row by row, and on real files where they are at hand."""

import logging

import pytest
from support.chat_files import EXTEND_START, chat, read_jsonl, write_rows

from verl.config import DataConfig
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture
def load(tokenizer, tmp_path):
    """Builds the data set of rows, or of a file; settings are those of ``data``."""

    def build(rows, extend_start=EXTEND_START, extended_sources=(), record=None, **settings):
        files = write_rows(tmp_path / "d.parquet", rows) if isinstance(rows, list) else rows
        return OneRecDataset(
            files,
            tokenizer,
            DataConfig(**settings),
            extend_vocab_start_token=extend_start,
            extended_sources=extended_sources,
            dropped_rows_path=record,
        )

    return build


def prompts_of(dataset):
    return [dataset[place]["raw_prompt"][-1]["content"] for place in range(len(dataset))]


def length_of(tokenizer, question):
    message = [{"role": "user", "content": question}]
    return len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))


def test_an_item_and_its_batch(load):
    rows = [chat("a", "A", metadata='{"uid": 7, "label": 1}', source="upper"), chat("b", uuid=None)]
    dataset = load([*rows, chat("c", uuid="id-a")])
    assert dataset[0] == {
        "raw_prompt": [{"role": "user", "content": "a"}],
        **dict.fromkeys(("data_source", "source"), "upper"),
        "reward_model": {"style": "rule", "ground_truth": "A"},
        **{"uuid": "id-a", "index": 0, "has_extended": False},
        **{"extra_info": {"uid": 7, "label": 1}, "tools_kwargs": {}},
    }
    assert dataset[1]["uuid"] == dataset[1]["uuid"] != dataset[0]["uuid"]  # made from file and row
    assert (dataset[2]["uuid"], dataset[2]["index"]) == ("id-a", 2)  # a row of its own, whatever its name
    batch = collate_fn([dataset[0], dataset[1]])
    assert {key: column.shape for key, column in batch.items()} == dict.fromkeys(dataset[0], (2,))
    assert batch["raw_prompt"][1] == [{"role": "user", "content": "b"}]


def test_bad_rows_are_counted_and_recorded(load, tmp_path, caplog):
    rows = [chat("a"), chat("b", messages=None), chat("c", messages=None, segments="[...]"), chat("d", messages="[{")]
    rows += [chat(" ", source="x"), chat("", source="y"), chat("  ", source="y"), chat("f", source="other")]
    rows.insert(7, chat("e", messages=r'[{"role": "user", "content": "\ud83d"}]'))
    record = tmp_path / "run" / "dropped.jsonl"
    with caplog.at_level(logging.INFO):
        dataset = load(rows, max_dropped_fraction=0.8, record=record)
    assert [(entry["raw_prompt"][0]["content"], entry["index"]) for entry in dataset] == [("a", 0), ("f", 8)]
    report = dataset.drop_report
    assert report.kept == {"letters": 1, "other": 1}
    assert report.dropped_by_source["blank_user_turn", "y"] == 2 and report.dropped["blank_user_turn"] == 3
    lines, blank = read_jsonl(record), ["blank_user_turn"] * 3
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    reasons = ["no_messages", "plain_text", "unreadable_messages", *blank, "unencodable_text"]
    assert [line["reason"] for line in lines] == reasons
    assert (lines[2]["text"], lines[2]["uuid"], lines[2]["file"]) == ("[{", "id-d", str(tmp_path / "d.parquet"))
    assert (lines[1]["text"], lines[1]["source"]) == ("[...]", "letters")
    assert "kept 2 of 9 rows, dropped 3 blank_user_turn" in caplog.text and str(record) in caplog.text


def test_overlong_prompts_are_filtered_exactly_at_the_limit_with_the_longest_think_switch(load, tokenizer):
    rows, filters = [chat("x" * n) for n in range(1, 9)], {"filter_overlong_prompts": True}
    limit = length_of(tokenizer, "xxxx")
    dataset = load(rows, max_prompt_length=limit, **filters)
    assert (len(dataset), dataset.drop_report.dropped) == (4, {"overlong": 4})
    with pytest.raises(ValueError, match=rf"row 4: {limit + 1} tokens, data.max_prompt_length={limit}"):
        load(rows, max_prompt_length=limit)
    rows, longest = [chat("x"), chat("x" * 30)], length_of(tokenizer, "x" * 30 + " /no_think")
    for limit, kept in ((longest, 2), (longest - 1, 1)):
        assert len(load(rows, max_prompt_length=limit, enable_think=True, **filters)) == kept


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_truncation_gives_ids_for_the_prompts_it_cuts(load, tokenizer, side):
    dataset = load([chat("x"), chat("x" * 50)], max_prompt_length=21, truncation=side)
    whole = tokenizer.apply_chat_template(dataset[1]["raw_prompt"], add_generation_prompt=True, return_dict=False)
    expected = {"left": whole[-21:], "right": whole[:21], "middle": whole[:10] + whole[-11:]}[side]
    assert dataset[0]["prompt_ids"] is None
    assert dataset[1]["prompt_ids"] == expected


def test_prompts_with_item_tokens(load):
    rows = [chat("a"), chat("<s_a_0>", "b"), chat("c", "<s_a_0>")]
    assert prompts_of(load(rows)) == ["a", "c"]  # an answer may hold them
    assert load(rows).drop_report.dropped == {"extended_tokens": 1}
    replaced = load([*rows, {"source": "empty"}, chat("b <s_b_1> <s_c_7>")], prompt_extend_tokens="replace")
    assert replaced.has_extended == [item["has_extended"] for item in replaced] == [False, True, False, True]
    for start in (None, EXTEND_START + 1):
        assert load(rows, extend_start=start).has_extended == [False] * 3
    sources = [chat("<s_a_0>", source=source) for source in ("rec_next", "recipes", "letters")]
    assert load(sources, extended_sources=["rec_*", "l?tters"]).sources == ["rec_next", "letters"]


def test_settings_that_stop_at_a_row_do_so_on_cached_rows_too(load):
    rows = [chat("a"), chat("b", messages="oops"), chat("c"), chat("<s_a_0>")]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"d\.parquet, row 1: .*unreadable_messages.*data\.on_bad_row=drop"):
            load(rows, on_bad_row="error")
        with pytest.raises(ValueError, match=r"row 3: the prompt holds 1 ids from 329 on.*prompt_extend_tokens=drop"):
            load(rows, prompt_extend_tokens="error")


def test_a_run_that_loses_too_much_stops(load, tmp_path):
    rows = [chat("a"), chat("b"), chat(" "), chat("c", messages="?")]
    record = tmp_path / "dropped_rows.jsonl"
    assert len(load(rows)) == 2  # just half of them
    with pytest.raises(ValueError, match=r"50\.0% of the 4 rows") as caught:
        load(rows, max_dropped_fraction=0.49, record=record)
    for part in ("1 blank_user_turn, 1 unreadable_messages", "data.max_dropped_fraction=0.49", str(record)):
        assert part in str(caught.value)
    assert len(read_jsonl(record)) == 2  # written all the same
    with pytest.raises(ValueError, match=r"data\.data_source_key='task' names no column"):
        load(rows, data_source_key="task")


def test_the_second_load_reads_the_checks_of_the_first(tiny_tokenizers, tmp_path, monkeypatch):
    tokenizer, prompts = hf_tokenizer(tiny_tokenizers[1]), []
    apply = tokenizer.apply_chat_template

    def counted(chats, **options):
        prompts.extend(chat for chat in chats if not chat["content"].startswith("question"))  # a look at the template
        return apply(chats, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    rows = [chat("a"), chat(" "), chat("<s_a_0>"), chat("x" * 60), chat("b")]
    path, record = write_rows(tmp_path / "d.parquet", rows), tmp_path / "dropped_rows.jsonl"
    base = {"max_prompt_length": 40, "filter_overlong_prompts": True, "max_dropped_fraction": 0.8}

    def load(files=path, extend_start=EXTEND_START, max_samples=-1, **settings):
        """Number of prompts tokenized, prompts kept, lines of the dropped ones."""
        prompts.clear()
        options = {"extend_vocab_start_token": extend_start, "dropped_rows_path": record, "max_samples": max_samples}
        dataset = OneRecDataset(files, tokenizer, DataConfig(**base | settings), **options)
        return len(prompts), prompts_of(dataset), read_jsonl(record)

    encoded, kept, dropped = load()
    assert (encoded, kept) == (4, ["a", "b"])
    reasons = [(1, "blank_user_turn"), (2, "extended_tokens"), (3, "overlong")]
    assert [(line["row"], line["reason"]) for line in dropped] == reasons
    assert load() == load(max_dropped_fraction=0.6, seed=5, train_batch_size=7) == (0, kept, dropped)
    moved = write_rows(tmp_path / "moved.parquet", rows)
    again, _, lines = load(moved)
    assert (again, [line["file"] for line in lines]) == (0, [str(moved)] * 3)
    changes = [
        {"max_prompt_length": 41},
        {"extend_start": EXTEND_START + 1},
        {"prompt_extend_tokens": "replace"},
        {"enable_think": True},
        {"apply_chat_template_kwargs": {"enable_thinking": False}},
        {"max_samples": 1},
        {"data_source_key": "data_source"},
    ]
    for change in changes:
        assert load(**change)[0] > 0 == load(**change)[0], change
    assert load(write_rows(path, [*rows, chat("c")]))[0] == 5
    tokenizer.chat_template = tokenizer.chat_template + "{# another #}"
    assert load()[0] == 5
    tokenizer.add_tokens(["another"])
    assert load()[0] == 5


def test_checks_of_a_class_of_ones_own_are_not_kept(tokenizer, tmp_path):
    reads = []

    class Reading(OneRecDataset):
        def read_prompt(self, row):
            reads.append(row["uuid"])
            return super().read_prompt(row)

    path = write_rows(tmp_path / "d.parquet", [chat("a"), chat("b")])
    for _ in range(2):
        Reading(path, tokenizer, DataConfig())
    assert reads == ["id-a", "id-b"] * 2


def test_real_files(shared_data):
    tokenizer = hf_tokenizer(shared_data / "tokenizer" / "mini8k-item256")
    config = DataConfig(max_prompt_length=128, filter_overlong_prompts=True, max_dropped_fraction=0.7)
    folder = shared_data / "onerec"
    report = OneRecDataset(folder / "*.parquet", tokenizer, config, extend_vocab_start_token=8218).drop_report
    assert (report.rows, report.kept) == (2000, {"gsm8k_train": 652, "svamp": 200})
    assert report.dropped == {"extended_tokens": 1000, "overlong": 148}
    benchmarks = OneRecDataset(folder / "eval", tokenizer, DataConfig(max_prompt_length=4096))
    assert len(benchmarks) == 270 and not benchmarks.drop_report.dropped
    assert benchmarks[0]["reward_model"]["ground_truth"] is None, "chats without an assistant's turn are prompts"

"""RLHFDataset on verl's layout, collation, and the choice of a data set class."""

import json

import pytest
import torch
from support.chat_files import write_rows

from verl.config import CustomClassConfig, DataConfig
from verl.experimental.agent_loop.base import ChatTemplate
from verl.trainer.data import build_datasets
from verl.utils.dataset.onerec_dataset import OneRecDataset, create_rl_dataset, get_dataset_class
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn


def verl_row(question, **row):
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 3},
        **row,
    }


def test_verl_rows(tokenizer, tmp_path):
    rows = [verl_row("2 + 2", agent_name="single_turn_agent"), verl_row("1 + 3")]
    path = write_rows(tmp_path / "train.parquet", rows)
    dataset = RLHFDataset(str(path), tokenizer, DataConfig())
    first, second = dataset[0], dataset[1]
    assert first.pop("uuid") != second.pop("uuid")
    assert first == {
        "raw_prompt": [{"role": "user", "content": "2 + 2"}],
        "data_source": "openai/gsm8k",
        "source": "openai/gsm8k",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "index": 0,
        "has_extended": False,
        "extra_info": {"split": "train", "index": 3},
        "tools_kwargs": {},
        "agent_name": "single_turn_agent",
    }
    assert second["agent_name"] is None


def test_sources_that_are_numbers(tokenizer, tmp_path):
    path = write_rows(tmp_path / "train.parquet", [verl_row(str(n), data_source=n % 3) for n in range(5)])
    assert RLHFDataset(str(path), tokenizer, DataConfig()).sources == ["0", "1", "2", "0", "1"]


def test_tools_of_rows_are_said_not_to_be_read(tokenizer, tmp_path, caplog):
    path = write_rows(tmp_path / "train.parquet", [verl_row("weather?", tools=[{"name": "weather"}])])
    RLHFDataset(str(path), tokenizer, DataConfig())
    assert "the column tools is not read" in caplog.text


def test_collate_stacks_tensors_and_keeps_objects():
    second = {"t": torch.tensor([1, 1]), "ids": [1, 2], "only": 1}
    batch = collate_fn([{"t": torch.tensor([0, 0]), "ids": [3, 4]}, second])
    assert batch["t"].tolist() == [[0, 0], [1, 1]]
    assert batch["ids"].tolist() == [[3, 4], [1, 2]] and batch["ids"].shape == (2,)
    assert list(batch["only"]) == [None, 1]
    with pytest.raises(ValueError, match="tensor 't' is missing from some of the 2 items"):
        collate_fn([{"t": torch.zeros(2)}, {}])


def test_the_columns_choose_the_class(tokenizer, tmp_path):
    verl_file = write_rows(tmp_path / "verl.parquet", [verl_row("a")])
    onerec_file = write_rows(tmp_path / "onerec.parquet", [{"messages": "[]"}])
    assert get_dataset_class(verl_file, DataConfig()) is RLHFDataset
    assert get_dataset_class(onerec_file, DataConfig()) is OneRecDataset
    assert len(create_rl_dataset(verl_file, tokenizer, DataConfig())) == 1


CUSTOM = """
from verl.utils.dataset.rl_dataset import RLHFDataset

class New(RLHFDataset):
    def __len__(self):
        return 1

other = 3

class OfVerl(RLHFDataset):  # all that verl's has
    def __init__(self, data_files, tokenizer, config, processor=None, max_samples=-1):
        super().__init__(data_files, tokenizer, config, processor, max_samples)

class Reads(RLHFDataset):
    def _read_files_and_tokenize(self):
        pass
"""


def test_a_custom_class(tokenizer, tmp_path):
    data, module = write_rows(tmp_path / "d.parquet", [verl_row("a"), verl_row("b")]), tmp_path / "mine.py"
    module.write_text(CUSTOM)

    def load(name, **options):
        config = DataConfig(custom_cls=CustomClassConfig(path=str(module), name=name))
        return len(create_rl_dataset(data, tokenizer, config, **options))

    assert load("New", extended_sources=["rec_*"], max_samples=2) == 1
    assert load("OfVerl", max_samples=1) == 1
    reads, takes = (
        r" overrides _read_.* override columns\(\) and read_prompt",
        r".*'tool_schemas'; write def __init__\(",
    )
    for name, message in {"Reads": reads, "OfVerl": takes}.items():
        with pytest.raises(ValueError, match=rf"data\.custom_cls\.name='{name}' in .*mine\.py{message}"):
            load(name, tool_schemas=[])
    with pytest.raises(ValueError, match=r"'other'.*is not a class that extends"):
        load("other")
    with pytest.raises(ValueError, match=r"needs data\.custom_cls\.name"):
        load(None)


def test_columns_of_json_text(tokenizer, tmp_path):
    kwargs = {"add": {"create_kwargs": {"start": 1}}}
    extra_info = {"split": "train", "tools_kwargs": json.dumps(kwargs)}
    row = verl_row("2 + 2", reward_model=json.dumps({"ground_truth": "4"}), extra_info=json.dumps(extra_info).encode())
    entry = RLHFDataset(write_rows(tmp_path / "d.parquet", [row]), tokenizer, DataConfig())[0]
    assert entry["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert (entry["extra_info"], entry["tools_kwargs"]) == (extra_info, kwargs)


def test_options_of_tools_lose_the_nulls_of_their_column(tokenizer, tmp_path):
    given = [
        {"add": {"create_kwargs": {"start": 1}}, "note": {"release_kwargs": {"keep": True}}},
        {"look": {"create_kwargs": {"at": "x", "sizes": [1, None]}}},
        None,
        {"add": {"create_kwargs": {}, "execute_kwargs": {"by": 2}}},
    ]
    rows = [verl_row(str(row), extra_info={"tools_kwargs": kwargs, "hint": None}) for row, kwargs in enumerate(given)]
    dataset = RLHFDataset(write_rows(tmp_path / "d.parquet", rows), tokenizer, DataConfig())
    assert [dataset[row]["tools_kwargs"] for row in range(4)] == [*given[:2], {}, given[3]]
    assert dataset[0]["extra_info"]["hint"] is None, "what a reward function reads stays as it is"
    text = verl_row("as text", extra_info='{"tools_kwargs": {"add": {"create_kwargs": {"start": null}}}}')
    kwargs = RLHFDataset(write_rows(tmp_path / "t.parquet", [text]), tokenizer, DataConfig())[0]["tools_kwargs"]
    assert kwargs == {"add": {"create_kwargs": {"start": None}}}, "JSON has the nulls that somebody wrote"


def test_columns_that_cannot_be_read_are_bad_rows(tokenizer, tmp_path):
    bad = [{"extra_info": "{"}, {"extra_info": "[1]"}, {"reward_model": "four"}, {"extra_info": '{"tools_kwargs": 3}'}]
    rows = [verl_row("a", **({"reward_model": None, "extra_info": " "} | changes)) for changes in ({}, *bad)]
    path = write_rows(tmp_path / "d.parquet", rows)
    dataset = RLHFDataset(path, tokenizer, DataConfig(max_dropped_fraction=0.8))
    assert dataset[0]["reward_model"] == {"style": "rule", "ground_truth": None}
    assert dataset[0]["extra_info"] == dataset[0]["tools_kwargs"] == {}
    assert len(dataset) == 1
    counts = {"extra_info": 2, "reward_model": 1, "tools_kwargs": 1}
    assert dataset.drop_report.dropped == {f"unreadable_{column}": rows for column, rows in counts.items()}
    with pytest.raises(ValueError, match=r"row 1: extra_info is a text that is not JSON.*data\.on_bad_row=drop"):
        RLHFDataset(path, tokenizer, DataConfig(on_bad_row="error"))


def test_a_row_without_the_name_of_a_loop_names_none(tokenizer, tmp_path):
    rows = [verl_row("2 + 2", agent_name=name) for name in ("tool_agent", None, "", "not read")]
    data = RLHFDataset(write_rows(tmp_path / "d.parquet", rows), tokenizer, DataConfig(), max_samples=3)
    assert data.agent_names == {"tool_agent", ""}


def test_prompts_are_as_long_as_the_agent_loop_makes_them(tokenizer, tmp_path):
    schemas = [{"type": "function", "function": {"name": "add", "description": "Für dich", "parameters": {}}}]
    template, message = ChatTemplate(tokenizer, schemas), [{"role": "user", "content": "2 + 2"}]
    short, long = (len(template.encode_prompt(message, with_tools=listed)) for listed in (False, True))
    names = ("tool_agent", "single_turn_agent", None)
    path = write_rows(tmp_path / "d.parquet", [verl_row("2 + 2", agent_name=name) for name in names])

    def kept(limit):
        settings = {"max_prompt_length": limit, "filter_overlong_prompts": True, "max_dropped_fraction": 0.7}
        config = DataConfig(train_files=str(path), **settings)
        dataset, _ = build_datasets(config, tokenizer, dropped_rows_folder=tmp_path, tool_schemas=schemas)
        return [entry["agent_name"] for entry in (dataset[place] for place in range(len(dataset)))]

    assert kept(long) == list(names)
    assert kept(long - 1) == kept(short) == ["single_turn_agent"]
    with pytest.raises(ValueError, match=r"no usable row .* are 3 overlong; .*; raise data\.max_prompt_length$"):
        kept(short - 1)

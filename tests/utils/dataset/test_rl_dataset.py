"""RLHFDataset on verl's layout, collation, and the choice of a data set class."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from verl.config import CustomClassConfig, DataConfig
from verl.experimental.agent_loop.chat_template import ChatTemplate
from verl.trainer.data import build_datasets
from verl.utils.dataset.onerec_dataset import create_rl_dataset, get_dataset_class
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizers):
    return hf_tokenizer(tiny_tokenizers[0])


def verl_row(question, **row):
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 3},
        **row,
    }


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_verl_rows(tokenizer, tmp_path):
    path = write(tmp_path / "train.parquet", [verl_row("2 + 2", agent_name="single_turn_agent"), verl_row("1 + 3")])
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


def test_another_prompt_key_and_a_row_without_a_question(tokenizer, tmp_path):
    rows = [{"chat": [{"role": "user", "content": "a"}]}, {"chat": [{"role": "system", "content": "b"}]}]
    dataset = RLHFDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig(prompt_key="chat"))
    assert dataset.drop_report.dropped == {"no_user_turn": 1}
    assert dataset[0]["source"] == "unknown"
    assert dataset[0]["reward_model"] == {"style": "rule", "ground_truth": None}


def test_collate_stacks_tensors_and_keeps_objects():
    first = {"t": torch.tensor([0, 0]), "ids": [3, 4]}
    second = {"t": torch.tensor([1, 1]), "ids": [1, 2], "only": 1}
    batch = collate_fn([first, second])
    assert torch.equal(batch["t"], torch.tensor([[0, 0], [1, 1]]))
    assert batch["ids"].shape == (2,)
    assert batch["ids"][1] == [1, 2]
    assert list(batch["only"]) == [None, 1]


def test_collate_names_a_tensor_that_some_items_lack():
    with pytest.raises(ValueError, match="tensor 't' is missing from some of the 2 items"):
        collate_fn([{"t": torch.zeros(2)}, {}])


def test_the_columns_choose_the_class(tokenizer, tmp_path):
    verl_file = write(tmp_path / "verl.parquet", [verl_row("a")])
    onerec_file = write(tmp_path / "onerec.parquet", [{"messages": "[]"}])
    assert get_dataset_class(verl_file, DataConfig()) is RLHFDataset
    assert get_dataset_class(onerec_file, DataConfig()) is OneRecDataset
    assert len(create_rl_dataset(verl_file, tokenizer, DataConfig())) == 1


def test_a_custom_class(tokenizer, tmp_path):
    data = write(tmp_path / "d.parquet", [verl_row("a"), verl_row("b")])
    module = tmp_path / "mine.py"
    module.write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Mine(RLHFDataset):\n"
        "    def __len__(self):\n"
        "        return 1\n"
        "other = 3\n"
    )
    custom = DataConfig(custom_cls=CustomClassConfig(path=str(module), name="Mine"))
    assert len(create_rl_dataset(data, tokenizer, custom)) == 1
    with pytest.raises(ValueError, match=r"'other'.*is no class that extends"):
        get_dataset_class(data, DataConfig(custom_cls=CustomClassConfig(path=str(module), name="other")))
    with pytest.raises(ValueError, match=r"needs data\.custom_cls\.name"):
        get_dataset_class(data, DataConfig(custom_cls=CustomClassConfig(path=str(module))))


def test_a_custom_class_of_before_there_were_sources_with_items(tokenizer, tmp_path):
    data = write(tmp_path / "d.parquet", [verl_row("a")])
    module = tmp_path / "mine.py"
    arguments = "extend_vocab_start_token=None, dropped_rows_path=None, max_samples=-1, tool_schemas=None"
    module.write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Old(RLHFDataset):\n"
        f"    def __init__(self, files, tokenizer, config, *, {arguments}):\n"
        "        super().__init__(files, tokenizer, config)\n"
        "class New(RLHFDataset):\n"
        "    def __init__(self, *arguments, **options):\n"
        "        super().__init__(*arguments, **options)\n"
    )
    old, new = (DataConfig(custom_cls=CustomClassConfig(path=str(module), name=name)) for name in ("Old", "New"))
    assert len(create_rl_dataset(data, tokenizer, old)) == 1
    assert len(create_rl_dataset(data, tokenizer, new, extended_sources=["rec_*"])) == 1
    with pytest.raises(ValueError, match=r"custom_cls\.name='Old' takes no argument 'extended_sources'.*teachers"):
        create_rl_dataset(data, tokenizer, old, extended_sources=["rec_*"])


def test_columns_of_json_text(tokenizer, tmp_path):
    row = verl_row("2 + 2")
    kwargs = {"add": {"create_kwargs": {"start": 1}}}
    columns = {
        "reward_model": row["reward_model"],
        "extra_info": {"split": "train", "tools_kwargs": json.dumps(kwargs)},
    }
    texts = {name: json.dumps(value) for name, value in columns.items()}
    rows = [row | texts, row | {name: text.encode() for name, text in texts.items()}]
    for number, each in enumerate(rows):
        entry = RLHFDataset(write(tmp_path / f"{number}.parquet", [each]), tokenizer, DataConfig())[0]
        assert entry["reward_model"] == {"style": "rule", "ground_truth": "4"}
        assert entry["extra_info"] == columns["extra_info"]
        assert entry["tools_kwargs"] == kwargs


def test_columns_that_cannot_be_read_are_bad_rows(tokenizer, tmp_path):
    row = {**verl_row("a"), "reward_model": None, "extra_info": " "}
    rows = [
        row,
        row | {"extra_info": "{"},
        row | {"extra_info": "[1]"},
        row | {"reward_model": "four"},
        row | {"extra_info": '{"tools_kwargs": 3}'},
    ]
    path = write(tmp_path / "d.parquet", rows)
    dataset = RLHFDataset(path, tokenizer, DataConfig(max_dropped_fraction=0.8))
    assert dataset[0]["reward_model"] == {"style": "rule", "ground_truth": None}
    assert dataset[0]["extra_info"] == dataset[0]["tools_kwargs"] == {}
    assert len(dataset) == 1
    assert dataset.drop_report.dropped == {
        "unreadable_extra_info": 2,
        "unreadable_reward_model": 1,
        "unreadable_tools_kwargs": 1,
    }
    with pytest.raises(ValueError, match=r"row 1: extra_info is a text that is no JSON.*data\.on_bad_row=drop"):
        RLHFDataset(path, tokenizer, DataConfig(on_bad_row="error"))


def test_prompts_are_as_long_as_the_agent_loop_makes_them(tokenizer, tmp_path):
    parameters = {"type": "object", "properties": {"first": {"type": "number"}}, "required": ["first"]}
    schemas = [
        {"type": "function", "function": {"name": name, "description": "Für dich", "parameters": parameters}}
        for name in ("add", "look")
    ]
    template = ChatTemplate(tokenizer, schemas, {"enable_thinking": False})
    message = [{"role": "user", "content": "2 + 2"}]
    sent = {
        "tool_agent": len(template.encode_prompt(message, with_tools=True)),
        "single_turn_agent": len(template.encode_prompt(message, with_tools=False)),
    }
    assert sent["single_turn_agent"] < sent["tool_agent"]
    path = write(tmp_path / "d.parquet", [verl_row("2 + 2", agent_name=name) for name in (*sent, None)])

    def kept(limit):
        config = DataConfig(
            train_files=str(path),
            max_prompt_length=limit,
            filter_overlong_prompts=True,
            max_dropped_fraction=0.7,
            apply_chat_template_kwargs={"enable_thinking": False},
        )
        dataset, _ = build_datasets(config, tokenizer, dropped_rows_folder=tmp_path, tool_schemas=schemas)
        return [entry["agent_name"] for entry in (dataset[place] for place in range(len(dataset)))]

    assert kept(sent["tool_agent"]) == ["tool_agent", "single_turn_agent", None]
    assert kept(sent["tool_agent"] - 1) == kept(sent["single_turn_agent"]) == ["single_turn_agent"]
    with pytest.raises(ValueError, match="no usable row"):
        kept(sent["single_turn_agent"] - 1)

"""RLHFDataset on verl's layout, collation, and the choice of a data set class."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from verl.trainer.config import CustomClassConfig, DataConfig
from verl.utils.dataset.factory import create_rl_dataset, get_dataset_class
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
        "extra_info": {"split": "train", "index": 3},
        "tools_kwargs": {},
        "agent_name": "single_turn_agent",
    }
    assert second["agent_name"] is None


def test_another_prompt_key_and_a_row_without_a_question(tokenizer, tmp_path):
    rows = [{"chat": [{"role": "user", "content": "a"}]}, {"chat": [{"role": "system", "content": "b"}]}]
    dataset = RLHFDataset(write(tmp_path / "d.parquet", rows), tokenizer, DataConfig(prompt_key="chat"))
    assert dataset.ledger.dropped == {"no_user_turn": 1}
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

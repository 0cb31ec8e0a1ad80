"""Loading tokenizers: pad tokens and errors."""

import json

import pytest

from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture
def folder(tmp_path):
    return build_tiny_tokenizers(tmp_path)[0]


def drop_from_config(folder, *keys):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))


def test_the_tiny_pair(folder):
    teacher, student = hf_tokenizer(folder), hf_tokenizer(str(folder.parent / "student"))
    assert (len(teacher), len(student)) == (329, 355)
    assert (teacher.pad_token, teacher.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert student.get_vocab().items() > teacher.get_vocab().items()
    assert student.encode("<s_a_0><s_c_7><|sid_begin|><|sid_end|>") == [329, 352, 353, 354]


def test_a_missing_pad_token_becomes_the_end_token(folder):
    drop_from_config(folder, "pad_token")
    assert hf_tokenizer(folder).pad_token == "<|im_end|>"


def test_neither_pad_nor_end_token(folder):
    drop_from_config(folder, "pad_token", "eos_token")
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        hf_tokenizer(folder)


def test_a_model_folder_whose_tokenizer_was_left_out(tmp_path):
    # transformers builds an empty tokenizer here, which encodes every prompt to nothing.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 512}))
    with pytest.raises(ValueError, match=r"holds no tokenizer that can encode text|no tokenizer could be loaded"):
        hf_tokenizer(tmp_path)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        hf_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        hf_tokenizer(tmp_path)

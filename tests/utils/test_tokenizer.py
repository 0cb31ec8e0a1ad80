"""Loading tokenizers, and where a model lies on this machine."""

import json
from pathlib import Path

import pytest

from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from verl.utils.tokenizer import hf_tokenizer, local_model_folder


@pytest.fixture
def folder(tmp_path):
    return build_tiny_tokenizers(tmp_path)[0]


def drop_from_config(folder, *keys):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))


def test_pad_and_end_tokens_that_are_missing(folder):
    drop_from_config(folder, "pad_token")
    assert hf_tokenizer(folder).pad_token == "<|im_end|>"
    drop_from_config(folder, "eos_token")
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        hf_tokenizer(folder)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        hf_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        hf_tokenizer(tmp_path)
    # transformers builds an empty tokenizer here, which encodes every prompt to nothing.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 512}))
    with pytest.raises(ValueError, match=r"holds no tokenizer that can encode text|no tokenizer could be loaded"):
        hf_tokenizer(tmp_path)


def test_the_folder_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    cache, own = tmp_path / "models--owner--name", tmp_path / "own"
    for made in (own, cache / "snapshots" / "abc", cache / "refs"):
        made.mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text("{}")
    (cache / "refs" / "main").write_text("abc")
    assert local_model_folder("owner/name") == cache / "snapshots" / "abc"
    assert local_model_folder(str(own)) == local_model_folder("~/own") == own
    for nothing in (None, "", "owner/other", "no such/na me", str(tmp_path / "absent")):
        assert local_model_folder(nothing) is None, nothing

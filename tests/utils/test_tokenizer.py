"""Loading tokenizers, and where a model lies on this machine."""

import json
import re
from pathlib import Path

import pytest
from support.vocab_pairs import add_token, edit_json, renumber, write_json

from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from verl.config import HFModelConfig, TrainerConfig
from verl.utils.tokenizer import answer_text, fit_tool_calls, hf_tokenizer, local_model_folder, save_tokenizer


@pytest.fixture
def folder(tmp_path):
    return build_tiny_tokenizers(tmp_path)[0]


def test_pad_and_end_tokens_that_are_missing(folder):
    path = folder / "tokenizer_config.json"
    edit_json(path, lambda values: values.pop("pad_token"))
    assert hf_tokenizer(folder).pad_token == "<|im_end|>"
    edit_json(path, lambda values: values.pop("eos_token"))
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        hf_tokenizer(folder)


@pytest.mark.parametrize("special", [False, True])
def test_the_text_of_an_answer_has_its_item_tokens_and_none_that_end_or_pad(tmp_path, special):
    tokenizer = hf_tokenizer(build_tiny_tokenizers(tmp_path)[1])
    items = [token for token in tokenizer.get_added_vocab() if token.startswith(("<|sid_", "<s_"))]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": items}, replace_extra_special_tokens=False)
    item = "<|sid_begin|><s_a_1><s_b_2><s_c_3><|sid_end|>"
    ids = tokenizer.encode(f"<|im_start|>buy {item}<|im_end|><|endoftext|>", add_special_tokens=False)
    assert (item in tokenizer.decode(ids, skip_special_tokens=True)) == (not special)
    assert answer_text(tokenizer, ids) == f"buy {item}"


def test_an_end_that_the_generation_config_alone_names_is_left_out(folder):
    tokenizer = hf_tokenizer(folder)
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages }}", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*tokenizer.encode("buy"), end]
    assert answer_text(hf_tokenizer(folder), ids) == "buy<|im_end|>"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    assert answer_text(hf_tokenizer(folder), ids) == "buy"


@pytest.mark.parametrize(("takes", "shown"), [("texts", "'<' + call.arguments"), ("objects", "call.arguments.items()")])
def test_a_template_that_is_strict_about_tool_calls_is_asked_in_its_own_form(folder, takes, shown):
    tokenizer = hf_tokenizer(folder)
    strict = "{% if tool.id | length != 9 %}{{ raise_exception('an id has nine letters') }}{% endif %}"
    calls = "{% for tool in message.tool_calls or [] %}{% set call = tool.function %}" + strict
    tokenizer.chat_template = (
        "{% for message in messages %}" + calls + "{{ " + shown + " }}{% endfor %}{{ message.content }}{% endfor %}"
    )
    call = {"id": "123456789", "function": {"name": "look", "arguments": {"x": 1}}}
    (fitted,) = fit_tool_calls(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call]}])
    arguments = fitted["tool_calls"][0]["function"]["arguments"]
    assert arguments == ('{"x": 1}' if takes == "texts" else {"x": 1})


OLD_IDS = {"added_tokens_decoder": {"355": {"content": "!"}}}
SPOILT = {
    "'<s_a_1>' has the id 330 as it loads and 9 in added_tokens.json, one of 1 such": (
        lambda folder: write_json(folder / "added_tokens.json", {"<s_a_1>": 9})
    ),
    "'!' has the id 0 as it loads and 355 in tokenizer_config.json, one of 1 such": (
        lambda folder: edit_json(folder / "tokenizer_config.json", lambda values: values.update(OLD_IDS))
    ),
    "'<new>' has the id 355 as it loads and 400 in tokenizer.json, one of 1 such tokens; take all": (
        lambda folder: add_token(folder, content="<new>", id=400)
    ),
}


@pytest.mark.parametrize("expected", SPOILT)
def test_a_tokenizer_that_loads_with_other_ids_than_its_files_have_is_refused(tmp_path, expected):
    folder = build_tiny_tokenizers(tmp_path)[1]
    assert len(hf_tokenizer(folder)) == 355
    SPOILT[expected](folder)
    with pytest.raises(ValueError, match=re.escape(expected)):
        hf_tokenizer(folder)


def test_gaps_and_pointers_are_refused(tmp_path):
    folder = build_tiny_tokenizers(tmp_path)[1]
    renumber(folder, lambda token_id: token_id + 5 if token_id > 340 else token_id)
    with pytest.raises(
        ValueError, match=r"sid_end\|>' has the id 359 as it loads and 354 in a vocabulary without gaps"
    ):
        hf_tokenizer(folder)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON: it is a Git LFS pointer"):
        hf_tokenizer(folder)


def test_a_saved_tokenizer_has_nothing_of_this_machine_and_the_names_of_transformers_4(tmp_path):
    tokenizer = hf_tokenizer(build_tiny_tokenizers(tmp_path)[1])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s_a_1>"]})
    save_tokenizer(tokenizer, tmp_path / "saved")
    text = (tmp_path / "saved" / "tokenizer_config.json").read_text()
    values = json.loads(text)
    assert str(tmp_path) not in text and not {"is_local", "local_files_only", "extra_special_tokens"} & values.keys()
    assert values["additional_special_tokens"] == ["<s_a_1>"]
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = hf_tokenizer(tmp_path / "saved")
    assert (again.get_vocab(), again.all_special_ids) == (tokenizer.get_vocab(), tokenizer.all_special_ids)
    assert (again.pad_token, again.chat_template) == (tokenizer.pad_token, tokenizer.chat_template)


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
    assert HFModelConfig(path="~/own").path == TrainerConfig(default_local_dir="~/own").default_local_dir == str(own)
    for nothing in (None, "", "owner/other", "no such/na me", str(tmp_path / "absent")):
        assert local_model_folder(nothing) is None, nothing

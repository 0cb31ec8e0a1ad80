"""Rows of item tokens as they were, and all else as it is."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from recipe.onpolicy_distill.combine_models import ROW_TENSORS
from recipe.onpolicy_distill.restore_extended_rows import main

START, ROWS = 20, 32


def write(folder, seed, tied, rows=ROWS, shard="1GB"):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"vocab_size": rows, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=tied, **sizes)).save_pretrained(folder, max_shard_size=shard)
    return folder


def restore(before, after, out, start=START):
    paths = {"--before": before, "--after": after, "--out": out, "--extend-vocab-start-token": start}
    main([str(word) for option in paths.items() for word in option])


@pytest.mark.parametrize(("tied", "shard"), [(True, "1GB"), (False, "1GB"), (False, "3KB")])
def test_only_the_extended_rows_change(tmp_path, tied, shard, capsys):
    before, after = write(tmp_path / "m0", 0, tied), write(tmp_path / "m1", 1, tied, shard=shard)
    out, file = tmp_path / "m2", after / "model.safetensors"
    if tied:  # some folders of tied models hold a copy as the head
        tensors = load_file(file)
        save_file(tensors | {ROW_TENSORS[1]: tensors[ROW_TENSORS[0]].clone()}, file, metadata={"format": "pt"})
    restore(before, after, out)
    assert "rows from 20 on" in capsys.readouterr().out
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (before, after, out)]
    for name, got in models[2].items():
        kept = START if name in ROW_TENSORS else len(got)
        torch.testing.assert_close(got[:kept], models[1][name][:kept], rtol=0, atol=0)
        torch.testing.assert_close(got[kept:], models[0][name][kept:], rtol=0, atol=0)
    written = {file.name for file in out.glob("*.safetensors")}
    assert written == {file.name for file in after.glob("*.safetensors")} and (len(written) > 1) == (shard == "3KB")
    assert ("lm_head.weight" in {name for file in out.glob("*.safetensors") for name in load_file(file)}) == (not tied)


def test_user_errors(tmp_path):
    tied, untied = write(tmp_path / "t", 0, True), write(tmp_path / "u", 0, False)
    larger = write(tmp_path / "l", 0, True, 40)
    (tmp_path / "empty").mkdir()
    for before, after, out, start, message in (
        (tied, tmp_path / "empty", "o1", 20, "holds no"),
        (tied, untied, "o2", 20, "one is tied and the other is not"),
        (larger, tied, "o3", 20, r"has the shape \[40, 16\] in .*l and \[32, 16\] in .*t"),
        (tied, tied, "o4", 32, "must lie between 1 and 31 for model.embed"),
        (tied, tied, "empty", 20, "exists already"),
    ):
        with pytest.raises(SystemExit, match=message):
            restore(before, after, tmp_path / out, start)

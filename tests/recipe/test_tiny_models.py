"""The tiny pair: shapes, shared weights, how far apart the two are, and bad arguments."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill.tiny_models import TinyPairConfig, build_tiny_models, main

KNOWN, EXTENDED = 329, 26  # ids of the teacher's tokenizer, and those that the student adds


def build(tiny_tokenizers, out, **settings):
    folders = build_tiny_models(*tiny_tokenizers, out, TinyPairConfig(**settings))
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]


@pytest.mark.parametrize("tied", [True, False])
def test_the_pair_differs_enough_to_distil(tiny_tokenizers, tmp_path, tied):
    teacher, student = build(tiny_tokenizers, tmp_path, tied=tied)
    assert teacher.config.tie_word_embeddings is student.config.tie_word_embeddings is tied
    ids = torch.arange(KNOWN).unsqueeze(0)
    with torch.no_grad():
        log_p, log_q = (model(ids).logits[..., :KNOWN].log_softmax(-1) for model in (student, teacher))
    reverse_kl, entropy = ((log_p.exp() * gap).sum(-1).mean().item() for gap in (log_p - log_q, -log_p))
    assert 0.1 < reverse_kl < 1.5 and 1.5 < entropy < 4.5  # log(329) = 5.8 would be a model that knows nothing


def run_main(tiny_tokenizers, out, *options):
    teacher, student = map(str, tiny_tokenizers)
    main(["--teacher-tokenizer", teacher, "--student-tokenizer", student, "--out", str(out), *options])


@pytest.mark.parametrize("tied", [True, False])
def test_command_line(tiny_tokenizers, tmp_path, capsys, tied):
    rows = ["--teacher-rows", "400", "--student-rows", "355", *(["--tied"] if tied else [])]
    run_main(tiny_tokenizers, tmp_path, "--hidden", "64", "--layers", "1", *rows)
    table = capsys.readouterr().out
    assert "EXTEND_VOCAB_START_TOKEN=329" in table
    shown = [line.split()[:4] for line in table.splitlines()[1:3]]
    assert shown == [["teacher", "329", "400", "71"], ["student", "355", "355", "0"]]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.tie_word_embeddings is tied


def test_bad_arguments(tiny_tokenizers, tmp_path):
    wrong = (("--hidden", "100", "100 must be a multiple of 64"), ("--teacher-rows", "300", "300 is less than the 329"))
    for option, value, message in wrong:
        with pytest.raises(SystemExit, match=f"{option} {message}"):
            run_main(tiny_tokenizers, tmp_path, option, value)
    with pytest.raises(SystemExit, match="'<s_a_0>' is id 329 for the teacher and None for the student"):
        run_main(reversed(tiny_tokenizers), tmp_path)
    assert not list(tmp_path.iterdir())

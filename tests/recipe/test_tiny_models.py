"""The tiny pair: shapes, shared weights, how peaked and how far apart the two are, and bad arguments."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill.tiny_models import TinyPairConfig, build_tiny_models, main
from verl.utils.tokenizer import hf_tokenizer

KNOWN, EXTENDED = 329, 26  # ids of the teacher's tokenizer, and those that the student adds


def build(tiny_tokenizers, out, **settings):
    folders = build_tiny_models(*tiny_tokenizers, out, TinyPairConfig(**settings))
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]


def student_samples(student, rows, length):
    """(rows, length) ids drawn from the student, which is what distillation trains on."""
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (rows, 4))
    with torch.no_grad():
        while ids.shape[1] < length:
            logits = student(ids).logits[:, -1, : KNOWN + EXTENDED]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids


@pytest.mark.parametrize("tied", [True, False])
def test_the_pair_differs_enough_to_distil(tiny_tokenizers, tmp_path, tied):
    teacher, student = build(tiny_tokenizers, tmp_path, tied=tied)
    assert teacher.config.tie_word_embeddings is student.config.tie_word_embeddings is tied
    ids = student_samples(student, rows=16, length=36)
    visible = ids.masked_fill(ids >= KNOWN, 0)
    with torch.no_grad():
        log_p = student(visible).logits[..., : KNOWN + EXTENDED].log_softmax(-1)
        log_q = teacher(visible).logits[..., :KNOWN].log_softmax(-1)
    p = log_p.exp()
    reverse_kl = (p[..., :KNOWN] * (log_p[..., :KNOWN] - log_q)).sum(-1).mean().item()
    entropy = -(log_q.exp() * log_q).sum(-1).mean().item()
    assert 0.1 < reverse_kl < 1.5
    assert 1.5 < entropy < 4.5  # log(329) = 5.8 would be a teacher that knows nothing
    assert 1e-5 < p[..., KNOWN:].sum(-1).mean().item() < 0.05


def test_rows_tokenizers_and_generation_config(tiny_tokenizers, tmp_path):
    teacher, student = build(tiny_tokenizers, tmp_path, hidden=64, layers=1)
    assert teacher.config.vocab_size % 128 == 0
    assert teacher.config.vocab_size >= KNOWN + 64
    assert student.config.vocab_size % 256 == 0
    assert student.config.vocab_size >= KNOWN + EXTENDED
    assert teacher.config.max_position_embeddings == 40960
    for folder, ids in (("teacher", KNOWN), ("student", KNOWN + EXTENDED)):
        tokenizer = hf_tokenizer(tmp_path / folder)
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert len(tokenizer) == ids
        assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert generation["pad_token_id"] == tokenizer.pad_token_id
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_without_noise_the_student_is_the_teacher_on_shared_ids(tiny_tokenizers, tmp_path):
    teacher, student = build(tiny_tokenizers, tmp_path, student_noise=0.0)
    ids = torch.arange(KNOWN).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits[..., :KNOWN], teacher(ids).logits[..., :KNOWN])
    rows = [model.get_input_embeddings().weight for model in (teacher, student)]
    collision = slice(KNOWN, KNOWN + EXTENDED)  # ids that fall among the teacher's padded rows
    assert not torch.allclose(rows[0][collision], rows[1][collision])


def test_the_seed_decides_the_weights(tiny_tokenizers, tmp_path):
    settings = {"hidden": 64, "layers": 1}
    weights = [
        build(tiny_tokenizers, tmp_path / str(number), seed=seed, **settings)[1].lm_head.weight
        for number, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_command_line(tiny_tokenizers, tmp_path, capsys):
    teacher, student = map(str, tiny_tokenizers)
    options = ["--hidden", "64", "--layers", "1", "--tied", "--teacher-rows", "400", "--student-rows", "355"]
    main(["--teacher-tokenizer", teacher, "--student-tokenizer", student, "--out", str(tmp_path), *options])
    table = capsys.readouterr().out
    assert "EXTEND_VOCAB_START_TOKEN=329" in table
    assert table.splitlines()[1].split()[:4] == ["teacher", "329", "400", "71"]
    assert table.splitlines()[2].split()[:4] == ["student", "355", "355", "0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "100"], "--hidden 100 must be a multiple of 64"),
        (["--teacher-rows", "300"], "--teacher-rows 300 is less than the 329 ids"),
        (["--student-noise", "-1"], "--student-noise -1.0 must not be negative"),
    ],
)
def test_bad_arguments(tiny_tokenizers, tmp_path, options, message):
    teacher, student = map(str, tiny_tokenizers)
    arguments = ["--teacher-tokenizer", teacher, "--student-tokenizer", student, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *options])
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_student_that_does_not_extend_the_teacher_is_refused(tiny_tokenizers, tmp_path):
    teacher, student = tiny_tokenizers
    with pytest.raises(ValueError, match="'<s_a_0>' is id 329 for the teacher and None for the student"):
        build_tiny_models(student, teacher, tmp_path, TinyPairConfig())

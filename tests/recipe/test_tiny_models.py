"""The command line of the tiny pair: rows and ids of its table, and bad arguments."""

import pytest
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill.tiny_models import main


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

"""Weighted sums of models: every tensor by hand, and the rows of ids that only some of them know."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill.combine_models import ROW_TENSORS, main
from recipe.onpolicy_distill.restore_extended_rows import main as restore


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def changed(folder, out, seed):
    """The model with other weights."""
    torch.manual_seed(seed)
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(out)
    return out


def combine(out, start, *parts, **options):
    words = [word for folder, coefficient in parts for word in ("--model", f"{folder}={coefficient}")]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    main([*map(str, words), "--out", str(out), "--extend-vocab-start-token", str(start)])
    return weights(out)


def test_shared_weights_are_summed_and_item_rows_are_of_those_who_know_them(tiny_pair, tmp_path):
    start, before = tiny_pair.extend_vocab_start_token, tiny_pair.student
    after = changed(before, tmp_path / "after", 1)
    got = combine(tmp_path / "out", start, (after, 1), (before, 0.5), (tiny_pair.teacher, -0.5))
    of_after, of_before, of_teacher = weights(after), weights(before), weights(tiny_pair.teacher)
    for name, tensor in got.items():
        rows = start if name in ROW_TENSORS else None
        summed = of_after[name][:rows] + 0.5 * of_before[name][:rows] - 0.5 * of_teacher[name][:rows]
        torch.testing.assert_close(tensor[:rows], summed)
        if rows:
            items = (of_after[name][rows:] + 0.5 * of_before[name][rows:]) / 1.5
            torch.testing.assert_close(tensor[rows:], items)
    # The ends of a line from one model to another are these models, but for rows that the teacher lacks.
    whole = combine(tmp_path / "whole", start, (after, 0), (tiny_pair.student, 1), **{"rows-from": after})
    for name, tensor in whole.items():
        rows = start if name in ROW_TENSORS else len(tensor)
        torch.testing.assert_close(tensor[:rows], of_before[name][:rows], rtol=0, atol=0)
        torch.testing.assert_close(tensor[rows:], of_after[name][rows:], rtol=0, atol=0)


def test_the_first_extended_id_may_come_from_the_teacher(tiny_pair, tmp_path):
    student, teacher = tiny_pair.student, tiny_pair.teacher
    given = combine(tmp_path / "given", tiny_pair.extend_vocab_start_token, (student, 0.5), (teacher, 0.5))
    found = combine(tmp_path / "found", "auto", (student, 0.5), (teacher, 0.5), teacher=teacher)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=0)
    paths = {"--before": student, "--after": tmp_path / "found", "--out": tmp_path / "restored", "--teacher": teacher}
    restore([*(str(word) for option in paths.items() for word in option), "--extend-vocab-start-token", "auto"])
    restored, start = weights(tmp_path / "restored"), tiny_pair.extend_vocab_start_token
    torch.testing.assert_close(restored[ROW_TENSORS[0]][start:], weights(student)[ROW_TENSORS[0]][start:])
    with pytest.raises(SystemExit, match="has no id that the teacher lacks"):
        combine(tmp_path / "same", "auto", (student, 1), teacher=student)


def test_a_disk_that_is_full_leaves_no_model(tiny_pair, tmp_path, monkeypatch):
    start, student = tiny_pair.extend_vocab_start_token, tiny_pair.student
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: no space left"):
        patch.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        combine(tmp_path / "out", start, (student, 1))
    assert not (tmp_path / "out").exists()
    assert combine(tmp_path / "out", start, (student, 1)).keys() == weights(student).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_user_errors(tiny_pair, tmp_path):
    start, student, teacher = tiny_pair.extend_vocab_start_token, tiny_pair.student, tiny_pair.teacher
    for parts, message in (
        ([(student, 0.5), (teacher, 0.4)], "add up to 0.9"),
        ([(student, 0), (teacher, 1)], "coefficients add up to 0; use --rows-from"),
        ([(student, 1), (student, 0.5), (teacher, 0.5)], "named twice"),
    ):
        with pytest.raises(SystemExit, match=message):
            combine(tmp_path / "out", start, *parts)
    with pytest.raises(SystemExit):  # argparse: no coefficient
        main(["--model", str(student), "--out", "o", "--extend-vocab-start-token", "1"])
    assert not (tmp_path / "out").exists()

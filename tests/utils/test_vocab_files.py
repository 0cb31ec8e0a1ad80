"""The vocabulary contract around its rules: row counts from weights, the report, the command line, strict and warn."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.vocab_pairs import END, STUDENT_IDS, TEACHER_IDS, Folders, copy_pair, write_json

from verl.utils.vocab_contract import enforce, main, read_contract, render
from verl.utils.vocab_models import IdRange, ModelVocabulary, count_ids, read_vocabulary, show_ranges, to_ranges


@pytest.fixture
def pair(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> Folders:
    return copy_pair(*tiny_tokenizers, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"vocab_size": 12, "eos_token_id": 3})
    return folder


@pytest.fixture
def read(tiny_tokenizers: tuple[Path, Path]) -> Callable[..., ModelVocabulary]:
    """Read the files of a model whose tokenizer lies elsewhere and ends answers at END."""
    return lambda model, **changes: read_vocabulary("student", str(model), str(tiny_tokenizers[1]), **changes)


def rows(count: int) -> np.ndarray:
    return np.zeros((count, 2), dtype=np.float32)


def test_ranges() -> None:
    ranges = to_ranges([9, 1, 2, 3, 5])
    assert ranges == (IdRange(1, 3), IdRange(5, 5), IdRange(9, 9))
    assert count_ids(ranges) == 5
    assert show_ranges(ranges) == "1-3, 5, 9"
    assert show_ranges(ranges, most=1) == "1-3 and 2 more ranges"
    assert to_ranges([]) == ()


def test_rows_of_a_single_file(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    save_file({"model.embed_tokens.weight": rows(12), "lm_head.weight": rows(12)}, model / "model.safetensors")
    files = read(model)
    assert (files.rows, files.rows_source, files.end_ids, files.problems, files.notes) == (
        12,
        "weights",
        (END, 3),
        (),
        (),
    )


def test_rows_of_an_index(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    save_file(
        {"model.embed_tokens.weight": rows(12), "mtp.model.embed_tokens.weight": rows(5)}, model / "a.safetensors"
    )
    save_file({"lm_head.weight": rows(12)}, model / "b.safetensors")
    names = {"model.embed_tokens.weight": "a", "mtp.model.embed_tokens.weight": "a", "lm_head.weight": "b"}
    weight_map = {name: f"{file}.safetensors" for name, file in names.items()}
    write_json(model / "model.safetensors.index.json", {"weight_map": weight_map})
    assert read(model).rows == 12
    (model / "b.safetensors").unlink()
    (problem,) = read(model).problems
    assert "a file of the weights is missing" in problem


def test_weights_that_do_not_fit_the_config(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    save_file({"model.embed_tokens.weight": rows(12), "lm_head.weight": rows(11)}, model / "model.safetensors")
    files = read(model)
    assert files.rows == 11
    assert files.problems == (
        f"{model}: lm_head.weight has 11 rows, and vocab_size=12 in config.json; correct config.json",
    )


def test_truncated_weights(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    save_file({"model.embed_tokens.weight": rows(12)}, model / "model.safetensors")
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-8])
    files = read(model)
    assert files.rows == 12
    assert "the weights cannot be read" in files.problems[0]


def test_models_that_say_little(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    assert read(model).notes == (
        f"{model} holds no weights in safetensors format: its rows are taken from config.json",
    )
    write_json(model / "config.json", {"text_config": {"vocab_size": 7}})
    assert read(model).rows == 7
    assert read(model, overrides={"vocab_size": 9, "eos_token_id": [1, 2]}).end_ids == (END, 1, 2)
    (model / "config.json").unlink()
    files = read(model)
    assert (files.rows, files.end_ids) == (None, None)
    assert files.notes == (f"{model} holds no config.json: its embedding rows are unknown",)


def test_broken_json_and_missing_folders(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON .*; copy the model again"):
        read(model)
    with pytest.raises(ValueError, match=r"the model folder '\./nowhere' does not exist"):
        read("./nowhere")
    assert read("owner/name").rows is None


def test_the_report(pair: Folders) -> None:
    lines = render(read_contract(str(pair.student), str(pair.teacher), TEACHER_IDS)).splitlines()
    report = {line[:12].strip(): line[12:] for line in lines}
    assert report["verdict"] == "SOUND WITH NOTES"
    assert report["ids"].split() == ["355", "329"]
    assert report["rows"].split("  ")[0] == "384 (from config.json)"
    assert report["padded"].split() == ["29", "(355-383)", "11", "(329-339)"]
    assert report["extended"] == "329-354: 26 ids that the teacher lacks"
    assert "            11 of them (329-339) fall on padded rows of the teacher, 15 lie past its last row" in lines
    assert report["threshold"].startswith("329 ")


def test_the_command_line(pair: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--student", str(pair.student), "--teacher", str(pair.teacher)]
    assert main(command) == 0
    assert "SOUND WITH NOTES" in capsys.readouterr().out
    assert main([*command, "--json", "--extend-vocab-start-token", "329"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["verdict"], values["extend_start"], values["colliding_ids"]) == ("sound with notes", 329, 11)
    assert (values["extended"], values["teacher"]["padded_rows"]) == ([[329, 354]], [329, 339])
    assert main([*command, "--extend-vocab-start-token", "null"]) == 1
    assert "UNSOUND" in capsys.readouterr().out


def test_the_command_line_with_tokenizers_elsewhere(pair: Folders, model: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizers = ["--student-tokenizer", str(pair.student), "--teacher-tokenizer", str(pair.teacher)]
    write_json(model / "config.json", {"vocab_size": 400})
    assert main(["--student", str(model), "--teacher", str(model), *tokenizers]) == 0
    assert "45 (355-399)" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1.5"])
def test_a_threshold_that_is_none(pair: Folders, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--student", "s", "--teacher", "t", f"--extend-vocab-start-token={value}"])
    assert f"{value!r} is none of a whole number from 1 on, auto and null" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_one_line(pair: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", str(pair.student / "nowhere"), "--teacher", str(pair.teacher)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: the tokenizer folder '{pair.student}/nowhere' does not exist\n"


def test_strict_stops_and_warn_goes_on(pair: Folders, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    unsound = read_contract(str(pair.student), str(pair.teacher), STUDENT_IDS)
    with pytest.raises(ValueError, match=r"(?s)trainer.vocab_check=warn.*\n- .*ids 329-354 .* set .*token=329"):
        enforce(unsound, "strict")
    assert caplog.text == ""
    enforce(unsound, "warn")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    enforce(read_contract(str(pair.student), str(pair.teacher)), "strict")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]

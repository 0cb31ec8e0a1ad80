"""The vocabulary contract around its rules: row counts from weights, the report, the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.vocab_pairs import END, TEACHER_IDS, Folders, copy_pair, write_json

from verl.utils.vocab_contract import main, read_contract, render
from verl.utils.vocab_models import ModelVocabulary, read_vocabulary


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
def read(tiny_tokenizers: tuple[Path, Path], model: Path) -> Callable[..., ModelVocabulary]:
    """Reads the files of a model whose tokenizer lies elsewhere and ends answers at END."""
    return lambda name=model, **changes: read_vocabulary("student", str(name), str(tiny_tokenizers[1]), **changes)


def save_rows(path: Path, **rows: int) -> None:
    save_file({f"{name}.weight": np.zeros((count, 2), dtype=np.float32) for name, count in rows.items()}, path)


def test_rows_of_the_weights(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    save_rows(model / "model-00001-of-00002.safetensors", **{"model.embed_tokens": 12, "mtp.model.embed_tokens": 5})
    save_rows(model / "model-00002-of-00002.safetensors", lm_head=12)
    found = read()
    assert (found.rows, found.end_ids, found.problems, found.notes) == (12, (END, 3), [], [])
    save_rows(model / "model-00002-of-00002.safetensors", lm_head=11)
    found = read()
    assert found.rows == 11
    problem = f"{model}: lm_head.weight has 11 rows, and vocab_size=12 in config.json; correct config.json"
    assert found.problems == [problem]


def test_models_that_say_little(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    note = f"{model} holds no weights in safetensors format: vocab_size of config.json is taken"
    assert (read().rows, read().notes) == (12, [note])
    write_json(model / "config.json", {"text_config": {"vocab_size": 7}})
    assert read().rows == 7
    assert read(overrides={"vocab_size": 9, "eos_token_id": [1, 2]}).end_ids == (END, 1, 2)
    assert (read("owner/name").rows, read("owner/name").end_ids) == (None, (END,))


def test_broken_files(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    (model / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"the weights .*model\.safetensors cannot be read: .*; copy the model again"):
        read()
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON: .*; copy the model again"):
        read()


def test_the_report(pair: Folders) -> None:
    lines = render(read_contract(str(pair.student), str(pair.teacher), TEACHER_IDS)).splitlines()
    report = {line[:12].strip(): line[12:] for line in lines}
    assert report["verdict"] == "SOUND WITH NOTES"
    assert (report["ids"].split(), report["rows"].split()) == (["355", "329"], ["384", "340"])
    assert report["padded_rows"].split("  ")[0] == "[(355, 383)]"
    assert report["end_token"].split("  ")[0] == "322 '<|im_end|>'"
    assert report["extended"] == "329-354: 26 ids that the teacher lacks"
    assert report[""] == "11 of them (329-339) fall on padded rows of the teacher"
    assert report["threshold"].startswith("329;")


def test_the_command_line(pair: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--student", str(pair.student), "--teacher", str(pair.teacher)]
    assert main(command) == 0
    assert "SOUND WITH NOTES" in capsys.readouterr().out
    assert main([*command, "--json", "--extend-vocab-start-token", "329"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["verdict"], values["extend_start"], values["colliding_ids"]) == ("sound with notes", 329, 11)
    assert (values["extended"], values["teacher"]["padded_rows"]) == ([[329, 354]], [[329, 339]])
    assert main([*command, "--extend-vocab-start-token", "null"]) == 1
    assert "UNSOUND" in capsys.readouterr().out


def test_a_folder_without_a_tokenizer_is_one_line(pair: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", str(pair.student / "none"), "--teacher", str(pair.teacher)]) == 2
    assert capsys.readouterr() == ("", f"error: the tokenizer folder '{pair.student}/none' does not exist\n")

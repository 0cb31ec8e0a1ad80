"""What student and teacher share: sound pairs, and every way in which a pair is not; and how it is read and reported.

The tiny teacher names ids 0-328 and has 340 rows, the tiny student adds 329-354.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_pairs import Pair
from support.vocab_pairs import (
    END,
    PAD,
    TEACHER_IDS,
    Folders,
    add_token,
    copy_pair,
    edit_json,
    edit_template,
    swap_tokens,
    write_configs,
    write_json,
)

from recipe.onpolicy_distill.quickstart.tokenizers import build_tokenizers
from verl.utils.vocab_contract import as_dict, main, read_contract, render, resolve_threshold
from verl.utils.vocab_models import ModelVocabulary, read_vocabulary
from verl.utils.vocab_rules import VocabContract

START = "actor_rollout_ref.rollout.extend_vocab_start_token"
FINGERPRINT = "e78600d0a4a14f54"
"""Of the tiny pair: checkpoints hold it."""


@pytest.fixture
def pair(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> Folders:
    return copy_pair(*tiny_tokenizers, tmp_path)


def contract_of(pair: Folders, start: int | str | None = "auto") -> VocabContract:
    return read_contract(str(pair.student), str(pair.teacher), start)


def only_problem(pair: Folders, start: int | str | None = "auto") -> str:
    contract = contract_of(pair, start)
    assert contract.verdict == "unsound"
    (problem,) = contract.problems
    return problem


def test_a_pair_with_weights_is_sound_without_notes(tiny_pair: Pair) -> None:
    contract = read_contract(str(tiny_pair.student), str(tiny_pair.teacher), tiny_pair.extend_vocab_start_token)
    assert (contract.verdict, contract.problems, contract.notes) == ("sound", [], [])
    assert contract.shared == list(range(TEACHER_IDS)) and contract.extended == list(range(TEACHER_IDS, 355))
    assert contract.extend_start == contract.derived_start == tiny_pair.extend_vocab_start_token == TEACHER_IDS


def test_the_pair_of_the_quickstart(pair: Folders, tmp_path: Path) -> None:
    teacher, student = build_tokenizers(tmp_path / "other", ["sort", "add"], 4)
    contract = read_contract(str(student), str(teacher))
    assert (contract.problems, contract.extend_start) == ([], contract.teacher.ids)
    other_family = read_contract(str(pair.student), str(teacher), TEACHER_IDS)
    assert "id 0 is '!' to the student and '\\n' to the teacher" in other_family.problems[0]


def test_the_real_pair(shared_data: Path, tmp_path: Path) -> None:
    pair = Folders(tmp_path / "student", tmp_path / "teacher")
    for folder in pair:
        folder.mkdir()
    write_configs(pair, 176_384, 151_936, 151_645)
    names = {"student_tokenizer": "qwen3-onerec", "teacher_tokenizer": "qwen3"}
    paths = {key: str(shared_data / "tokenizer" / name) for key, name in names.items()}
    found = as_dict(read_contract(str(pair.student), str(pair.teacher), **paths))
    assert (found["problems"], found["extend_start"], found["extended_ids"]) == ([], 151_669, 24_578)
    assert (found["extended"], found["collisions"]) == ([(151_669, 176_246)], [(151_669, 151_935)])


def edit_student(change: Callable[[dict[str, Any]], Any]) -> Callable[[Folders], None]:
    return lambda pair: edit_json(pair.student / "tokenizer.json", change)


BROKEN: dict[str, Callable[[Folders], Any]] = {
    "id 32 is 'B' to the student and 'A' to the teacher, and 2 of the 329 ids ... actor_rollout_ref.ref.model.path": (
        lambda pair: swap_tokens(pair.student, "A", "B")
    ),
    "the student's end token is 0 '!' and the teacher's 322 '<|im_end|>'; set": (
        lambda pair: edit_json(pair.student / "tokenizer_config.json", lambda values: values.update(eos_token="!"))
    ),
    "the teacher also ends an answer at 320 '<|endoftext|>' ... student/generation_config.json": (
        lambda pair: write_json(pair.teacher / "generation_config.json", {"eos_token_id": [END, PAD]})
    ),
    "different ids for the chats think off: 328 '</think>' for the student ... chat_template.jinja": (
        lambda pair: edit_template(pair.student, "<think>\\n\\n</think>\\n\\n", "<think></think>")
    ),
    "the chats tools, tool result:  ... for the student and none for the teacher": (
        lambda pair: edit_template(pair.teacher, "{%- if tools -%}", "{%- if tools -%}{{- raise_exception('no') -}}")
    ),
    "the student's tokenizer has no chat template": lambda pair: (pair.student / "chat_template.jinja").unlink(),
    "the student has 350 embedding rows ... 355 ids: 350-354 (first 350 ": (
        lambda pair: write_configs(pair, 350, 329, END)
    ),
    "the teacher has 324 embedding rows ... 329 ids: 324-328 (first 324 ": (
        lambda pair: write_configs(pair, 355, 324, END)
    ),
    "1 extended tokens (first 355 'item1') become other ids in a text; set single_word": (
        lambda pair: add_token(pair.student, content="item1", single_word=True)
    ),
    "equal ids, but  ... (different merges)": edit_student(lambda tokenizer: tokenizer["model"]["merges"].pop()),
    "equal ids, but  ... (different normalizer)": (
        edit_student(lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}))
    ),
}
"""What spoils a pair, by the parts of what is said of it."""


@pytest.mark.parametrize("expected", BROKEN)
def test_an_unsound_pair(pair: Folders, expected: str) -> None:
    BROKEN[expected](pair)
    problem = only_problem(pair)
    assert all(part in problem for part in expected.split(" ... ")), problem


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (328, "=328: ids 328 (first 328 '</think>'), lie inside the shared vocabulary and would never be scored"),
        (330, "=330: ids 329 (first 329 '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
        (500, "=500: ids 329-354 (first 329 '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
        (None, "=null: ids 329-354 (first 329 '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
    ],
)
def test_a_threshold_that_does_not_fit(pair: Folders, start: int | None, expected: str) -> None:
    assert only_problem(pair, start) == f"{START}{expected}; set {START}=329, or auto"


def test_student_equal_to_teacher(pair: Folders) -> None:
    shutil.copytree(pair.teacher, pair.student, dirs_exist_ok=True)
    for start in ("auto", None):
        contract = contract_of(pair, start)
        assert (contract.problems, contract.extend_start, contract.extended, contract.collisions) == ([], None, [], [])
    assert "extend_vocab_start_token=329 marks nothing" in contract_of(pair, 329).notes[-1]
    assert only_problem(pair, 320).endswith(f"set {START}=null, or auto")


NOTED: dict[str, Callable[[Folders], Any]] = {
    "the teacher's tokenizer has no chat template": lambda pair: (pair.teacher / "chat_template.jinja").unlink(),
    "the think tokens 327 '<think>', 328 '</think>' are extended": lambda pair: edit_json(
        pair.teacher / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].__delitem__(slice(-2, None))
    ),
    'plain text becomes extended ids: "The answer: 3 + 4': lambda pair: add_token(pair.student, content="answer"),
    "1 extended tokens change a text (lstrip, rstrip?): 'a <x><x> b' comes back as 'a<x><x> b'": (
        lambda pair: add_token(pair.student, content="<x>", lstrip=True)
    ),
}


@pytest.mark.parametrize("note", NOTED)
def test_what_is_noted(pair: Folders, note: str) -> None:
    NOTED[note](pair)
    contract = contract_of(pair)
    assert contract.verdict == "sound with notes"
    assert any(each.startswith(note) for each in contract.notes)


def test_the_fingerprint_is_of_shared_tokens_and_threshold(pair: Folders) -> None:
    first = contract_of(pair)
    assert contract_of(pair, TEACHER_IDS).fingerprint == first.fingerprint == FINGERPRINT
    assert contract_of(pair, TEACHER_IDS + 1).fingerprint != first.fingerprint
    edit_template(pair.student, "<think>\\n\\n</think>\\n\\n", "<think></think>")
    assert contract_of(pair).fingerprint == first.fingerprint, "templates are no vocabulary"
    swap_tokens(pair.student, "A", "B")
    assert contract_of(pair).fingerprint != first.fingerprint


# ------------------------------------------------------------------ rows of the weights, the report, the command line
@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"vocab_size": 12, "eos_token_id": 3})
    return folder


@pytest.fixture
def read(tiny_tokenizers: tuple[Path, Path], model: Path) -> Callable[..., ModelVocabulary]:
    """Reads the files of a model whose tokenizer lies elsewhere and ends answers at END."""
    return lambda name=model, own=None: read_vocabulary("student", str(name), str(tiny_tokenizers[1]), False, own)


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
    assert read(own={"vocab_size": 9, "eos_token_id": [1, 2]}).end_ids == (END, 1, 2)
    assert (read("owner/name").rows, read("owner/name").end_ids) == (None, (END,))


def test_broken_files(model: Path, read: Callable[..., ModelVocabulary]) -> None:
    (model / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"the weights .*model\.safetensors cannot be read: .*; copy the model again"):
        read()
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON: .*; copy the model again"):
        read()


def test_the_report(pair: Folders) -> None:
    lines = render(contract_of(pair, TEACHER_IDS)).splitlines()
    report = {line[:12].strip(): line[12:] for line in lines}
    assert report["verdict"] == "SOUND WITH NOTES"
    assert (report["ids"].split(), report["rows"].split()) == (["355", "329"], ["384", "340"])
    assert report["padded_rows"].split("  ")[0] == "[(355, 383)]"
    assert report["end_token"].split("  ")[0] == "322 '<|im_end|>'"
    counted, named = report["extended"].split(" (")
    assert counted == "329-354: 26 ids that the teacher lacks"
    assert [name.split()[0] for name in named.split(", ")] == ["329", "330", "331", "354"]
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


def test_a_threshold_for_a_command(pair: Folders) -> None:
    assert resolve_threshold("auto", str(pair.student), str(pair.teacher)) == 329
    assert resolve_threshold("auto", str(pair.student), str(pair.student)) is None
    assert (resolve_threshold(7, "none", None), resolve_threshold(None, "none", None)) == (7, None)
    assert resolve_threshold(329, str(pair.student), str(pair.teacher)) == 329
    assert resolve_threshold(400, str(pair.teacher), str(pair.teacher)) == 400, "a teacher has none of the ids"
    for wrong in (None, 328, 330, 400):
        shown = "null" if wrong is None else wrong
        with pytest.raises(ValueError, match=rf"token {shown}: the ids .* on the wrong side; 329 would be right"):
            resolve_threshold(wrong, str(pair.student), str(pair.teacher))
    with pytest.raises(ValueError, match="auto compares two tokenizers; name the teacher's with --teacher"):
        resolve_threshold("auto", str(pair.student), None)
    next(iter(BROKEN.values()))(pair)
    with pytest.raises(ValueError, match=r"do not fit; give the id:\n- "):
        resolve_threshold("auto", str(pair.student), str(pair.teacher))


def test_a_folder_without_a_tokenizer_is_one_line(pair: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student", str(pair.student / "none"), "--teacher", str(pair.teacher)]) == 2
    assert capsys.readouterr() == ("", f"error: the tokenizer folder '{pair.student}/none' does not exist\n")

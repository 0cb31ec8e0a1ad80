"""What student and teacher share: sound pairs, and every way in which a pair is not.

The tiny teacher names ids 0-328 and has 340 rows, the tiny student adds 329-354.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.vocab_pairs import (
    END,
    PAD,
    STUDENT_IDS,
    TEACHER_IDS,
    Folders,
    copy_pair,
    edit_json,
    edit_template,
    edit_tokenizer,
    renumber,
    swap_tokens,
    write_configs,
    write_json,
)

from recipe.onpolicy_distill.quickstart.tokenizers import build_tokenizers
from verl.utils.vocab_contract import Verdict, VocabContract, read_contract

if TYPE_CHECKING:
    from support.tiny_pairs import Pair


@pytest.fixture
def pair(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> Folders:
    return copy_pair(*tiny_tokenizers, tmp_path)


def contract_of(pair: Folders, start: int | str | None = "auto") -> VocabContract:
    return read_contract(str(pair.student), str(pair.teacher), start)


def only_problem(pair: Folders, start: int | str | None = "auto") -> str:
    contract = contract_of(pair, start)
    assert contract.verdict is Verdict.UNSOUND
    (problem,) = contract.problems
    return problem


def only_note(pair: Folders, start: int | str | None = "auto") -> str:
    """The note beside the two that these folders hold no weights."""
    contract = contract_of(pair, start)
    assert contract.verdict is Verdict.SOUND_WITH_NOTES
    (note,) = [note for note in contract.notes if "holds no weights" not in note]
    return note


def test_the_tiny_pair(pair: Folders) -> None:
    contract = contract_of(pair)
    assert contract.problems == ()
    assert (contract.student.ids, contract.teacher.ids, contract.shared_ids) == (STUDENT_IDS, TEACHER_IDS, TEACHER_IDS)
    assert contract.extend_start == contract.derived_start == TEACHER_IDS
    assert (contract.extended, contract.extended_ids) == (((329, 354),), 26)
    assert (contract.collisions, contract.beyond_teacher) == (((329, 339),), ((340, 354),))
    assert (contract.student.padded_rows, contract.teacher.padded_rows) == ((355, 383), (329, 339))
    assert (contract.student.eos_id, contract.student.pad_id, contract.student.think_ids) == (END, PAD, (327, 328))
    assert contract.student.end_ids == (END,)


def test_a_pair_with_weights_is_sound_without_notes(tiny_pair: "Pair") -> None:
    contract = read_contract(str(tiny_pair.student), str(tiny_pair.teacher), tiny_pair.extend_vocab_start_token)
    assert (contract.verdict, contract.problems, contract.notes) == (Verdict.SOUND, (), ())
    assert contract.teacher.rows_source == "weights"
    assert contract.extend_start == tiny_pair.extend_vocab_start_token


def test_the_pair_of_the_quickstart(tmp_path: Path) -> None:
    teacher, student = build_tokenizers(tmp_path, ["sort", "add"], 4)
    contract = read_contract(str(student), str(teacher))
    assert contract.problems == ()
    assert contract.extend_start == contract.teacher.ids


@pytest.mark.parametrize(
    ("teacher", "student", "rows", "extended", "colliding"),
    [
        ("qwen3", "qwen3-onerec", (151_936, 176_384), (151_669, 176_246), 267),
        ("mini8k", "mini8k-item256", (8_448, 9_216), (8_218, 8_987), 230),
    ],
)
def test_real_pairs(
    shared_data: Path,
    tmp_path: Path,
    teacher: str,
    student: str,
    rows: tuple[int, int],
    extended: tuple[int, int],
    colliding: int,
) -> None:
    tokenizers = shared_data / "tokenizer"
    pair = copy_pair(tokenizers / teacher, tokenizers / student, tmp_path)
    write_configs(pair, rows[1], rows[0], contract_of(pair).student.eos_id or 0)
    contract = contract_of(pair)
    assert contract.problems == ()
    assert contract.extend_start == extended[0]
    assert contract.extended == (extended,)
    assert contract.extended_ids == extended[1] - extended[0] + 1
    assert contract.as_dict()["colliding_ids"] == colliding
    assert contract.collisions == ((extended[0], extended[0] + colliding - 1),)


def test_a_swapped_token(pair: Folders) -> None:
    swap_tokens(pair.student, "A", "B")
    problem = only_problem(pair)
    assert problem.startswith("id 32 is 'B' to the student and 'A' to the teacher, and 2 of the 329 ids")
    assert "actor_rollout_ref.ref.model.path" in problem


def test_another_familys_tokenizer(pair: Folders, tmp_path: Path) -> None:
    teacher, _ = build_tokenizers(tmp_path / "other", ["sort", "add"], 4)
    contract = read_contract(str(pair.student), str(teacher), TEACHER_IDS)
    assert contract.verdict is Verdict.UNSOUND
    assert "id 0 is '!' to the student and '\\n' to the teacher" in contract.problems[0]
    assert "another family's tokenizer" in contract.problems[0]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (328, "=328 lies inside the shared vocabulary: ids 328 (first '</think>')"),
        (330, "=330: ids 329 (first '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
        (340, "=340: ids 329-339 (first '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
        (500, "=500: ids 329-354 (first '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
        (None, "=null: ids 329-354 (first '<s_a_0>'), which the teacher lacks, are neither shared nor extended"),
    ],
)
def test_a_threshold_that_does_not_fit(pair: Folders, start: int | None, expected: str) -> None:
    problem = only_problem(pair, start)
    assert f"actor_rollout_ref.rollout.extend_vocab_start_token{expected}" in problem
    assert "set actor_rollout_ref.rollout.extend_vocab_start_token=329" in problem


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_another_end_token(pair: Folders, broken: str) -> None:
    def change(values: dict[str, Any]) -> None:
        values["eos_token"] = "<|endoftext|>"

    edit_json(getattr(pair, broken) / "tokenizer_config.json", change)
    problem = only_problem(pair)
    names = {"student": "320 '<|endoftext|>'", "teacher": "322 '<|im_end|>'"}
    if broken == "teacher":
        names = dict(zip(names, reversed(names.values()), strict=True))
    assert problem.startswith(
        f"the student's end token is {names['student']} and the teacher's {names['teacher']}; set"
    )


def test_an_end_of_the_teachers_that_does_not_stop_the_student(pair: Folders) -> None:
    write_json(pair.teacher / "generation_config.json", {"eos_token_id": [END, PAD]})
    problem = only_problem(pair)
    assert "the teacher ends an answer at 320 '<|endoftext|>' too" in problem
    assert f"{pair.student}/generation_config.json" in problem
    write_json(pair.student / "generation_config.json", {"eos_token_id": [END, PAD]})
    assert contract_of(pair).problems == ()


def test_a_student_that_stops_at_more_is_only_noted(pair: Folders) -> None:
    write_json(pair.student / "generation_config.json", {"eos_token_id": [END, STUDENT_IDS - 1]})
    assert only_note(pair) == "the student's engine also stops at 354 '<|sid_end|>', the teacher not"


def test_a_template_that_changes_ids(pair: Folders) -> None:
    edit_template(pair.student, "<think>\\n\\n</think>\\n\\n", "<think></think>")
    problem = only_problem(pair)
    assert "different ids for the chat 'think off': 328 '</think>' for the student" in problem
    assert "chat_template.jinja" in problem


def test_a_template_that_refuses_tools(pair: Folders) -> None:
    refuses = ("{%- if tools -%}", "{%- if tools -%}{{- raise_exception('no tools') -}}")
    edit_template(pair.teacher, *refuses)
    problem = only_problem(pair)
    assert "the chat 'tools' (so do: tool result)" in problem
    assert "nothing (the template refuses it) for the teacher" in problem
    edit_template(pair.student, *refuses)
    assert contract_of(pair).problems == (), "a chat that both refuse is no difference"


def test_a_template_that_changes_only_its_own_text(pair: Folders) -> None:
    edit_template(pair.student, "{%- if tools -%}", "{#- tools come first -#}{%- if tools -%}")
    assert only_note(pair) == "the chat templates differ in text, but not in the ids of 9 probe chats"


def test_a_missing_template(pair: Folders) -> None:
    (pair.teacher / "chat_template.jinja").unlink()
    assert "the teacher's tokenizer has no chat template" in only_note(pair)
    (pair.student / "chat_template.jinja").unlink()
    assert "the student's tokenizer has no chat template" in only_problem(pair)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_too_few_rows(pair: Folders, broken: str) -> None:
    rows = {"student": 355, "teacher": 329}
    write_configs(pair, rows["student"], rows["teacher"], END)
    assert contract_of(pair).problems == ()
    rows[broken] -= 5
    write_configs(pair, rows["student"], rows["teacher"], END)
    problem = only_problem(pair)
    assert f"the {broken} has {rows[broken]} embedding rows (config.json)" in problem
    assert f"ids: {rows[broken]}-{rows[broken] + 4} (first {rows[broken]} " in problem


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_missing_tokenizer_files(pair: Folders, broken: str) -> None:
    folder = getattr(pair, broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="tokenizer") as error:
        contract_of(pair)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["auto", None])
def test_student_equal_to_teacher(pair: Folders, start: str | None) -> None:
    shutil.copytree(pair.teacher, pair.student, dirs_exist_ok=True)
    assert only_note(pair, start) == ("student and teacher name the same ids: no extension, and no threshold is needed")
    contract = contract_of(pair, start)
    assert (contract.extend_start, contract.extended, contract.collisions) == (None, (), ())


def test_a_threshold_without_an_extension(pair: Folders) -> None:
    shutil.copytree(pair.teacher, pair.student, dirs_exist_ok=True)
    assert "extend_vocab_start_token=329 marks nothing" in only_note(pair, 329)
    assert "=320 lies inside the shared vocabulary" in only_problem(pair, 320)


def test_a_gap_within_the_extended_ids(pair: Folders) -> None:
    renumber(pair.student, lambda token_id: token_id + 5 if token_id > 340 else token_id)
    contract = contract_of(pair)
    assert contract.extended == ((329, 340), (346, 359))
    assert contract.student.gaps == ((341, 345),)
    assert "names 355 ids with a gap (341-345 name nothing)" in only_problem(pair)


def test_extended_ids_that_are_not_one_tail(pair: Folders) -> None:
    # The teacher lacks 327 and 328 and has 329: the student's 327 and 328 are extended, its 329 is not.
    renumber(pair.teacher, lambda token_id: 329 if token_id == 328 else None if token_id == 327 else token_id)
    swapped = {328: 329, 329: 328}
    renumber(pair.student, lambda token_id: swapped.get(token_id, token_id))
    contract = contract_of(pair)
    assert contract.verdict is Verdict.UNSOUND
    assert contract.extended == ((327, 328), (330, 354))
    [tail] = [problem for problem in contract.problems if "not one tail" in problem]
    assert "id 329 '</think>', behind 327 '<think>', is the teacher's too" in tail


def test_a_teacher_that_knows_more(pair: Folders) -> None:
    contract = read_contract(str(pair.teacher), str(pair.student))
    assert contract.problems == ()
    assert contract.extend_start is None
    assert any("the teacher names 26 ids that the student lacks (329-354" in note for note in contract.notes)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tokenizer: tokenizer["model"]["merges"].pop(), "merges"),
        (lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}), "normalizer"),
    ],
)
def test_equal_tokens_that_cut_texts_differently(pair: Folders, change: Any, part: str) -> None:
    edit_tokenizer(pair.student, change)
    problem = only_problem(pair)
    assert problem.startswith("equal ids, but ") and f"(different {part})" in problem


def test_plain_text_that_becomes_extended_ids_is_noted(pair: Folders) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        token = {**tokenizer["added_tokens"][-1], "id": STUDENT_IDS, "content": "answer"}
        tokenizer["added_tokens"].append(token)

    edit_tokenizer(pair.student, change)
    note = only_note(pair)
    assert note.startswith('plain text becomes extended ids: "The answer: 3 + 4')


def test_think_tokens_that_the_teacher_lacks_are_noted(pair: Folders) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        del tokenizer["added_tokens"][-2:]

    edit_tokenizer(pair.teacher, change)
    contract = contract_of(pair)
    assert contract.extend_start == 327
    assert any("the think tokens 327 '<think>', 328 '</think>' are extended" in note for note in contract.notes)


def test_other_pad_tokens_are_noted(pair: Folders) -> None:
    def change(values: dict[str, Any]) -> None:
        values["pad_token"] = "<|im_start|>"

    edit_json(pair.teacher / "tokenizer_config.json", change)
    assert only_note(pair).startswith("the student pads with 320 '<|endoftext|>', the teacher with 321 '<|im_start|>'")


def test_the_fingerprint_is_of_shared_tokens_and_threshold(pair: Folders) -> None:
    first = contract_of(pair)
    assert contract_of(pair, TEACHER_IDS).fingerprint == first.fingerprint
    assert contract_of(pair, TEACHER_IDS + 1).fingerprint != first.fingerprint
    edit_template(pair.student, "<think>\\n\\n</think>\\n\\n", "<think></think>")
    assert contract_of(pair).fingerprint == first.fingerprint, "templates are no vocabulary"
    swap_tokens(pair.student, "A", "B")
    assert contract_of(pair).fingerprint != first.fingerprint

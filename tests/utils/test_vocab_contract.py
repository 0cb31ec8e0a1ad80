"""No id may lie between what the teacher knows and what counts as extended."""

import pytest

from verl.utils.vocab_contract import check_extension


@pytest.mark.parametrize(
    ("student", "teacher", "start"),
    [
        (176_247, 151_669, 151_669),  # OneRec on Qwen3
        (151_669, 151_669, None),  # one vocabulary
        (151_669, 151_669, 151_669),  # an extension that is empty
        (100, 120, None),  # a student that knows less
        (120, 100, 90),  # shared ids that are treated as extended: scored by nobody, known to the masks
    ],
)
def test_sound_vocabularies_pass(student: int, teacher: int, start: int | None) -> None:
    check_extension(student, teacher, start)


@pytest.mark.parametrize(
    ("student", "teacher", "start", "between"),
    [
        # 151,936 is the number of the teacher's rows, 267 of which its tokenizer does not name.
        (176_247, 151_669, 151_936, "151669 to 151935"),
        (176_247, 151_669, None, "151669 to 176246"),
        (101, 100, 500, "100 to 100"),
    ],
)
def test_ids_between_shared_and_extended_are_refused(
    student: int, teacher: int, start: int | None, between: str
) -> None:
    with pytest.raises(ValueError, match=rf"ids {between} .* set .*extend_vocab_start_token={teacher}"):
        check_extension(student, teacher, start)

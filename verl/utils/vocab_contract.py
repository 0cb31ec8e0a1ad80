"""What student and teacher share, established before a run and enforced.

::

    python -m verl.utils.vocab_contract --student MODEL --teacher MODEL [--extend-vocab-start-token N|auto] [--json]

In: two models (folders or hub names) and the threshold. Out: a ``VocabContract`` with a verdict: sound, sound with
notes, or unsound with what to set. Compared are the tokenizers, id by id and on probe texts and chats, the end, pad
and think tokens, and the rows of the embeddings. Weights are not loaded, only the headers of their files are read.

B = ids that both tokenizers name, E = ids that the student's alone names. A threshold describes the pair where
``id >= threshold`` means the same as "in E". The rules are in ``vocab_rules``.
"""

import argparse
import hashlib
import json
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from verl.utils.vocab_models import IdRange, ModelVocabulary, count_ids, read_vocabulary, show_ranges, to_ranges
from verl.utils.vocab_rules import PairCheck

logger = logging.getLogger(__name__)

AUTO = "auto"
COLUMNS, LABEL, CELL = 120, 12, 53


class Verdict(StrEnum):
    """Whether the pair may be trained."""

    SOUND = "sound"
    SOUND_WITH_NOTES = "sound with notes"
    UNSOUND = "unsound"


@dataclass(frozen=True)
class VocabContract:
    """What two models share, and whether a threshold describes it."""

    student: ModelVocabulary
    teacher: ModelVocabulary
    extend_start: int | None
    """First extended id: the one set, or derived for ``auto``. None: no extension."""
    derived_start: int | None
    """First id of the student that the teacher's tokenizer lacks; None: there is none."""
    shared_ids: int
    """Ids at which both tokenizers name the same token."""
    extended: tuple[IdRange, ...]
    """E: ids of the student that the teacher's tokenizer lacks."""
    text_probes: int
    """Texts encoded with both tokenizers; 0 where the shared ids differ already."""
    chat_probes: int
    """Chats rendered with both templates; 0 where one has none."""
    problems: tuple[str, ...]
    """Why the pair must not be trained as it is, each with what to set."""
    notes: tuple[str, ...]
    """What a user should know and may have meant."""
    fingerprint: str
    """Of the shared tokens and the threshold: equal where two runs mean the same by both."""

    @property
    def verdict(self) -> Verdict:
        """Whether the pair may be trained."""
        if self.problems:
            return Verdict.UNSOUND
        return Verdict.SOUND_WITH_NOTES if self.notes else Verdict.SOUND

    @property
    def extended_ids(self) -> int:
        """Number of ids in E."""
        return count_ids(self.extended)

    @property
    def collisions(self) -> tuple[IdRange, ...] | None:
        """Ids of E that fall on padded rows of the teacher, which takes them without an error; None: rows unknown."""
        rows = self.teacher.rows
        if rows is None:
            return None
        return tuple(IdRange(part.first, min(part.last, rows - 1)) for part in self.extended if part.first < rows)

    @property
    def beyond_teacher(self) -> tuple[IdRange, ...] | None:
        """Ids of E that are past the teacher's last row; None: rows unknown."""
        rows = self.teacher.rows
        if rows is None:
            return None
        return tuple(IdRange(max(part.first, rows), part.last) for part in self.extended if part.last >= rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it; ranges are pairs of a first and a last id."""
        collisions = self.collisions
        return {
            "verdict": str(self.verdict),
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "student": self.student.as_dict(),
            "teacher": self.teacher.as_dict(),
            "extended_ids": self.extended_ids,
            "collisions": collisions,
            "colliding_ids": None if collisions is None else count_ids(collisions),
            "beyond_teacher": self.beyond_teacher,
        }


def read_contract(
    student: str,
    teacher: str,
    extend_vocab_start_token: int | str | None = AUTO,
    *,
    student_tokenizer: str | None = None,
    teacher_tokenizer: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> VocabContract:
    """Read both models and compare them.

    Args:
        student: folder or hub name of the model.
        teacher: the same.
        extend_vocab_start_token: the threshold; ``auto``: derived, None where the student has no extension; None: none.
        student_tokenizer: folder or hub name, where it is not the model's.
        teacher_tokenizer: the same.
        trust_remote_code: run tokenizer code that ships with the models.
        overrides: entries that replace those of both models' config.json.

    Raises:
        ValueError: a tokenizer is missing, or a file is broken. An unsound pair is a verdict, not an error.
    """
    ours = read_vocabulary("student", student, student_tokenizer, trust_remote_code, overrides)
    theirs = read_vocabulary("teacher", teacher, teacher_tokenizer, trust_remote_code, overrides)
    pair = PairCheck(ours, theirs, extend_vocab_start_token)
    assert not isinstance(pair.start, str), "auto was resolved"
    digest = hashlib.sha256(f"start {pair.start}".encode())
    for token_id in sorted(pair.shared):
        digest.update(f"\n{token_id} {ours.tokens[token_id]!r}".encode())
    return VocabContract(
        student=ours,
        teacher=theirs,
        extend_start=pair.start,
        derived_start=pair.first,
        shared_ids=len(pair.shared),
        extended=to_ranges(pair.extended),
        text_probes=pair.text_probes,
        chat_probes=pair.chat_probes,
        problems=tuple(pair.problems),
        notes=tuple(pair.notes),
        fingerprint=digest.hexdigest()[:16],
    )


def enforce(contract: VocabContract, mode: str) -> None:
    """Report the contract, and stop a run whose pair is unsound.

    Args:
        mode: ``trainer.vocab_check``: ``strict`` stops, ``warn`` only logs.

    Raises:
        ValueError: the pair is unsound and ``mode`` is strict; a line each for what is wrong and what to set.
    """
    if contract.verdict is not Verdict.UNSOUND:
        logger.info("the vocabularies of student and teacher\n%s", render(contract))
    elif mode == "strict":
        what = "student and teacher do not fit together (trainer.vocab_check=warn would train them all the same):"
        raise ValueError("\n".join((what, *(f"- {problem}" for problem in contract.problems))))
    else:
        logger.warning("trainer.vocab_check=%s lets an unsound pair pass\n%s", mode, render(contract))


def render(contract: VocabContract) -> str:
    """The contract as a table of 120 columns, problems and notes below."""
    sides = contract.student, contract.teacher
    rows: list[tuple[str, ...]] = [("", "STUDENT", "TEACHER"), ("model", *(side.model for side in sides))]
    if any(side.tokenizer_path != side.model for side in sides):
        rows.append(("tokenizer", *(side.tokenizer_path for side in sides)))
    rows += [
        ("ids", *(f"{side.ids:,}" for side in sides)),
        ("rows", *("unknown" if side.rows is None else f"{side.rows:,} (from {side.rows_source})" for side in sides)),
        ("padded", *map(_padded, sides)),
        ("end token", *(side.name(side.eos_id) for side in sides)),
        ("ends at", *("unknown" if side.end_ids is None else _list(side.end_ids) for side in sides)),
        ("pad token", *(side.name(side.pad_id) for side in sides)),
        ("think", *(_list(dict.fromkeys(side.think_ids)) for side in sides)),
    ]
    # The end of a path identifies it better than its beginning.
    cells = [[cell if len(cell) <= CELL else f"…{cell[1 - CELL :]}" for cell in row] for row in rows]
    lines = [f"{'verdict':{LABEL}}{contract.verdict.upper()}"]
    lines += [f"{label:{LABEL}}{student:{CELL}} {teacher}".rstrip() for label, student, teacher in cells]
    probes = f"{contract.text_probes} probe texts and {contract.chat_probes} probe chats compared"
    lines.append(f"{'shared':{LABEL}}{contract.shared_ids:,} ids name the same token; {probes}")
    extended = f"{show_ranges(contract.extended)}: {contract.extended_ids:,} ids that the teacher lacks"
    lines.append(f"{'extended':{LABEL}}{extended if contract.extended else 'none'}")
    collisions, beyond = contract.collisions, contract.beyond_teacher
    if contract.extended and collisions is not None and beyond is not None:
        where = f" ({show_ranges(collisions)})" if collisions else ""
        padded = f"{count_ids(collisions):,} of them{where} fall on padded rows of the teacher"
        lines.append(f"{'':{LABEL}}{padded}, {count_ids(beyond):,} lie past its last row")
    start, derived = ("none" if id is None else str(id) for id in (contract.extend_start, contract.derived_start))
    advice = f", where {derived} would fit" if start != derived else ""
    lines.append(f"{'threshold':{LABEL}}{start + advice:{CELL}} fingerprint {contract.fingerprint}")
    for label, texts in (("problem", contract.problems), ("note", contract.notes)):
        for text in texts:
            lines += textwrap.wrap(
                text,
                COLUMNS,
                initial_indent=f"{label:{LABEL}}",
                subsequent_indent=" " * LABEL,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _padded(side: ModelVocabulary) -> str:
    if side.rows is None:
        return "unknown"
    return f"{count_ids([side.padded_rows]):,} ({side.padded_rows})" if side.padded_rows else "none"


def _list(ids: Any) -> str:
    return ", ".join("none" if token_id is None else str(token_id) for token_id in ids) or "none"


def _threshold(text: str) -> int | str | None:
    """``--extend-vocab-start-token``: a number, ``auto`` or ``null``."""
    if text in (AUTO, "null"):
        return AUTO if text == AUTO else None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of a whole number from 1 on, auto and null")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.vocab_contract",
        description="Compare the vocabularies of a student and its teacher.",
        epilog="Exit code: 0 sound, 1 unsound, 2 could not be compared.",
    )
    parser.add_argument("--student", required=True, metavar="MODEL", help="folder or hub name")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="folder or hub name")
    parser.add_argument("--student-tokenizer", metavar="FOLDER", help="where it is not the model's")
    parser.add_argument("--teacher-tokenizer", metavar="FOLDER", help="where it is not the model's")
    parser.add_argument(
        "--extend-vocab-start-token",
        type=_threshold,
        default=AUTO,
        metavar="N",
        help="threshold to check: a number, null (no extension) or auto (derived; the default)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run tokenizer code that ships with a model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    try:
        contract = read_contract(**arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(contract.as_dict(), indent=2, ensure_ascii=False) if as_json else render(contract))
    return int(contract.verdict is Verdict.UNSOUND)


if __name__ == "__main__":
    sys.exit(main())

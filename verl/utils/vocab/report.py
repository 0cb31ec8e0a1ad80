"""A vocabulary contract on one screen: at most 24 lines of 120 columns."""

import textwrap
from collections.abc import Iterator

from verl.utils.vocab.contract import VocabContract
from verl.utils.vocab.id_ranges import count_ids, show_ranges
from verl.utils.vocab.side import SideFacts, name_id

LINES, COLUMNS = 24, 120
LABEL, CELL = 12, 53


def render(contract: VocabContract) -> str:
    """The whole report."""
    table = [f"{'verdict':{LABEL}}{contract.verdict.upper()}", *_sides(contract), *_together(contract)]
    return "\n".join([*table, *_findings(contract, LINES - len(table))])


def _sides(contract: VocabContract) -> Iterator[str]:
    sides = student, teacher = contract.student, contract.teacher
    yield _row("", "STUDENT", "TEACHER")
    yield _row("model", student.model, teacher.model)
    if (student.tokenizer, teacher.tokenizer) != (student.model, teacher.model):
        yield _row("tokenizer", student.tokenizer, teacher.tokenizer)
    yield _row("ids", f"{student.ids:,}", f"{teacher.ids:,}")
    yield _row("rows", _rows(student), _rows(teacher))
    yield _row("padded", _padded(student), _padded(teacher))
    yield _row("end token", *(name_id(side.eos_id, side.eos_token) for side in sides))
    yield _row("ends at", _ends(student), _ends(teacher))
    yield _row("pad token", *(name_id(side.pad_id, side.pad_token) for side in sides))
    yield _row("think", _think(student), _think(teacher))


def _together(contract: VocabContract) -> Iterator[str]:
    probes = f"{contract.text_probes} probe texts and {contract.chat_probes} probe chats compared"
    yield f"{'shared':{LABEL}}{contract.shared_ids:,} ids name the same token; {probes}"
    if contract.extended:
        extended = f"{show_ranges(contract.extended)}: {contract.extended_ids:,} ids that the teacher lacks"
        yield f"{'extended':{LABEL}}{extended}"
    else:
        yield f"{'extended':{LABEL}}none"
    collisions, beyond = contract.collisions, contract.beyond_teacher
    if contract.extended and collisions is not None and beyond is not None:
        where = f" ({show_ranges(collisions)})" if collisions else ""
        padded = f"{count_ids(collisions):,} of them{where} fall on padded rows of the teacher"
        yield f"{'':{LABEL}}{padded}, {count_ids(beyond):,} lie past its last row"
    yield _row("threshold", _threshold(contract), f"fingerprint {contract.fingerprint}")


def _threshold(contract: VocabContract) -> str:
    start, derived = (
        "none" if value is None else str(value) for value in (contract.extend_start, contract.derived_start)
    )
    agree = contract.shared_ids + contract.extended_ids == contract.student_ids
    return f"{start}, where {derived} would fit" if agree and start != derived else start


def _findings(contract: VocabContract, room: int) -> Iterator[str]:
    """Problems before notes; what does not fit is counted."""
    entries = [("problem", text) for text in contract.problems] + [("note", text) for text in contract.notes]
    wrapped = [_wrap(label, text) for label, text in entries]
    while sum(map(len, wrapped)) + (len(wrapped) < len(entries)) > room:
        wrapped.pop()
    for lines in wrapped:
        yield from lines
    if len(wrapped) < len(entries):
        yield f"{'':{LABEL}}and {len(entries) - len(wrapped)} more; --json names them all"


def _wrap(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=f"{label:{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(label: str, student: str, teacher: str) -> str:
    return f"{label:{LABEL}}{_fit(student):{CELL}} {_fit(teacher)}".rstrip()


def _fit(text: str) -> str:
    """The end of a path says more than its beginning."""
    return text if len(text) <= CELL else f"…{text[1 - CELL :]}"


def _rows(side: SideFacts) -> str:
    if side.rows is None:
        return "unknown"
    return f"{side.rows:,} (from {side.rows_source})"


def _padded(side: SideFacts) -> str:
    if side.rows is None:
        return "unknown"
    padded = side.padded_rows
    return f"{padded.size:,} ({padded})" if padded else "none"


def _ends(side: SideFacts) -> str:
    if side.end_ids is None:
        return "unknown beyond the end token"
    return ", ".join(map(str, side.end_ids)) or "nowhere"


def _think(side: SideFacts) -> str:
    return ", ".join("none" if token is None else str(token) for token in dict.fromkeys(side.think_ids))

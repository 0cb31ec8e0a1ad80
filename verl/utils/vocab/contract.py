"""The result of comparing a student's vocabulary with its teacher's: plain values, ready for JSON."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from verl.utils.vocab.id_ranges import IdRange, count_ids
from verl.utils.vocab.side import SideFacts


class Verdict(StrEnum):
    """Whether the pair may be trained."""

    SOUND = "sound"
    SOUND_WITH_NOTES = "sound with notes"
    UNSOUND = "unsound"


@dataclass(frozen=True)
class VocabContract:
    """What two models share, and whether a threshold describes it."""

    student: SideFacts
    teacher: SideFacts
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
        if self.problems:
            return Verdict.UNSOUND
        return Verdict.SOUND_WITH_NOTES if self.notes else Verdict.SOUND

    @property
    def student_ids(self) -> int:
        """Ids that the student's tokenizer names."""
        return self.student.ids

    @property
    def teacher_ids(self) -> int:
        """Ids that the teacher's tokenizer names."""
        return self.teacher.ids

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
            **asdict(self),
            "student": {**asdict(self.student), "padded_rows": self.student.padded_rows},
            "teacher": {**asdict(self.teacher), "padded_rows": self.teacher.padded_rows},
            "extended_ids": self.extended_ids,
            "collisions": collisions,
            "colliding_ids": None if collisions is None else count_ids(collisions),
            "beyond_teacher": self.beyond_teacher,
        }

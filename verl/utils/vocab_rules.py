"""What makes a pair of student and teacher sound.

In: both vocabularies and the threshold. Out: problems, which stop a run, and notes. A problem names the first ids and
tokens concerned and what to set.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from verl.utils.vocab_models import IdRange, ModelVocabulary, show_ranges, to_ranges
from verl.utils.vocab_probes import CHATS, Difference, compare_chats, compare_texts

START_KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"
MODEL_KEYS = {"student": "actor_rollout_ref.model", "teacher": "actor_rollout_ref.ref.model"}


@dataclass
class PairCheck:
    """Student and teacher compared, rule by rule.

    Args:
        start: the threshold in force; None: no extension; ``auto``: the first extended id.
    """

    student: ModelVocabulary
    teacher: ModelVocabulary
    start: int | str | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_probes: int = 0
    """Texts encoded with both tokenizers; 0 where the shared ids differ already."""
    chat_probes: int = 0
    """Chats rendered with both templates; 0 where one has none."""

    def __post_init__(self) -> None:
        ours, theirs = self.student.tokens, self.teacher.tokens
        common = ours.keys() & theirs.keys()
        self.shared = {token_id for token_id in common if ours[token_id] == theirs[token_id]}
        """Ids of the same token."""
        self.differing = sorted(common - self.shared)
        """Ids that both name, differently."""
        self.extended = sorted(ours.keys() - theirs.keys())
        """E: ids that the student alone names."""
        self.missing = sorted(theirs.keys() - ours.keys())
        """Ids that the teacher alone names."""
        self.first = self.extended[0] if self.extended else None
        """The first id of E."""
        if isinstance(self.start, str):
            self.start = self.first
        self._check_shared_tokens()
        self._check_gaps_and_tail()
        # Where tokens differ, the rules behind an `if` would report what follows from that and advise wrongly.
        if not self.differing:
            self._check_threshold()
        self._check_rows()
        self._check_end_tokens()
        self._check_templates()
        if not self.differing:
            self._check_pad_and_think()
            self._check_texts()

    def _check_shared_tokens(self) -> None:
        """An id that both name is the same token to both."""
        if self.differing:
            first, many = self.differing[0], len(self.differing)
            common = many + len(self.shared)
            cause = "another family's tokenizer" if many > common / 2 else "not the tokenizer the student grew from"
            student_key, teacher_key = MODEL_KEYS.values()
            self.problems.append(
                f"id {first} is {self.student.tokens[first]!r} to the student and {self.teacher.tokens[first]!r} to "
                f"the teacher, and {many:,} of the {common:,} ids that both name differ ({_show(self.differing)}): "
                f"{cause}; give {teacher_key}.path the model that the student extends, or correct "
                f"{student_key}.tokenizer_path or {teacher_key}.tokenizer_path"
            )
        elif self.missing:
            self.notes.append(
                f"the teacher names {len(self.missing):,} ids that the student lacks ({_show(self.missing)}; first "
                f"{self.teacher.tokens[self.missing[0]]!r}): the student cannot write them"
            )

    def _check_gaps_and_tail(self) -> None:
        """Ids run from 0 without gaps and E is their tail, for masks compare with the threshold and softmaxes count."""
        for side in (self.student, self.teacher):
            if side.gaps:
                self.problems.append(
                    f"the {side.role}'s tokenizer names {side.ids:,} ids with a gap ({show_ranges(side.gaps)} name "
                    f"nothing), and a run takes its ids to be 0-{side.ids - 1}: ids from {side.ids} on would never be "
                    "sampled or scored; number the tokens without gaps, or name the free ids"
                )
        behind = max(self.teacher.tokens.keys() & self.student.tokens.keys(), default=-1)
        if self.first is not None and behind > self.first:
            self.problems.append(
                f"the extended ids {_show(self.extended)} are not one tail: id {behind} "
                f"{self.student.tokens[behind]!r}, behind {self.first} {self.student.tokens[self.first]!r}, is the "
                f"teacher's too, and masks go by id >= {START_KEY}; append the student's own tokens after all of the "
                "teacher's"
            )

    def _check_threshold(self) -> None:
        """The threshold is the first extended id."""
        first, start, student = self.first, self.start, self.student
        assert not isinstance(start, str), "auto was resolved"
        if first is None:
            if start is None:
                if student.tokens == self.teacher.tokens:
                    self.notes.append("student and teacher name the same ids: no extension, and no threshold is needed")
            elif start < student.ids:
                self.problems.append(
                    f"{START_KEY}={start} lies inside the shared vocabulary: the student has no id that the teacher "
                    f"lacks, and ids {start}-{student.ids - 1} (first {student.name(start)}) would never be scored; "
                    f"set {START_KEY}=null, or auto"
                )
            else:
                self.notes.append(f"{START_KEY}={start} marks nothing: the student has no id that the teacher lacks")
        elif start is None or start > first:
            between = [token_id for token_id in self.extended if start is None or token_id < start]
            self.problems.append(
                f"{START_KEY}={'null' if start is None else start}: ids {_show(between)} (first "
                f"{student.tokens[first]!r}), which the teacher lacks, are neither shared nor extended; set "
                f"{START_KEY}={first}, or auto"
            )
        elif start < first:
            lost = [token_id for token_id in self.shared if token_id >= start]
            known = f"first {student.tokens[start]!r}" if start in student.tokens else "named by neither"
            self.problems.append(
                f"{START_KEY}={start} lies inside the shared vocabulary: ids {_show(lost)} ({known}), which the "
                f"teacher knows, would count as extended and never be scored; set {START_KEY}={first}, or auto"
            )

    def _check_rows(self) -> None:
        """Every id has an embedding row, and the model loads."""
        for side in (self.student, self.teacher):
            self.problems += side.problems
            self.notes += side.notes
            if side.rows is not None and side.rows < side.ids:
                self.problems.append(
                    f"the {side.role} has {side.rows:,} embedding rows ({side.rows_source}) and its tokenizer names "
                    f"{side.ids:,} ids: {IdRange(side.rows, side.ids - 1)} (first {side.name(side.rows)}) have no "
                    f"row; resize the model's embedding to {side.ids}, or give {MODEL_KEYS[side.role]}.tokenizer_path "
                    "the tokenizer that belongs to it"
                )

    def _check_end_tokens(self) -> None:
        """The student's engine stops where the teacher ends an answer.

        Else the student learns to write the teacher's end token and then writes on, in a context that the teacher has
        never seen. The other way round an answer is merely cut.
        """
        ours, theirs = self.student, self.teacher
        if ours.eos_id != theirs.eos_id:
            texts = [side.tokens.get(side.eos_id) for side in (ours, theirs) if side.eos_id is not None]
            if self.differing and len(set(texts)) == 1:
                return  # one token at two ids: reported with the tokens that differ
            self.problems.append(
                f"the student's end token is {ours.name(ours.eos_id)} and the teacher's {theirs.name(theirs.eos_id)}; "
                f"set eos_token of {ours.tokenizer_path}/tokenizer_config.json to the teacher's"
            )
            return
        if ours.end_ids is None or theirs.end_ids is None:
            return
        running_on = [token_id for token_id in theirs.end_ids if token_id not in ours.end_ids]
        if running_on:
            self.problems.append(
                f"the teacher ends an answer at {', '.join(map(theirs.name, running_on))} too, and the student's "
                f"engine stops at {', '.join(map(str, ours.end_ids)) or 'none'} only; add it to eos_token_id in "
                f"{ours.model}/generation_config.json"
            )
        cut = [token_id for token_id in ours.end_ids if token_id not in theirs.end_ids]
        if cut:
            self.notes.append(f"the student's engine also stops at {', '.join(map(ours.name, cut))}, the teacher not")

    def _check_templates(self) -> None:
        """Both templates make the same ids of a chat."""
        ours, theirs = self.student.tokenizer.chat_template, self.teacher.tokenizer.chat_template
        if not ours:
            self.problems.append(
                "the student's tokenizer has no chat template, and prompts are chats; copy the teacher's "
                f"chat_template.jinja to {self.student.tokenizer_path}"
            )
        if not theirs:
            self.notes.append("the teacher's tokenizer has no chat template: it may never have seen a chat")
        if not ours or not theirs:
            return
        self.chat_probes = len(CHATS)
        differences = compare_chats(self.student.tokenizer, self.teacher.tokenizer)
        if differences:
            first, others = differences[0], [difference.probe for difference in differences[1:]]
            also = f" (so do: {', '.join(others)})" if others else ""
            self.problems.append(
                f"the chat templates give different ids for the chat '{first.probe}'{also}: "
                f"{_first_difference(first, self.student, self.student)}; copy "
                f"{self.teacher.tokenizer_path}/chat_template.jinja to the student's tokenizer, or the other way round"
            )
        elif ours != theirs:
            self.notes.append(f"the chat templates differ in text, but not in the ids of {len(CHATS)} probe chats")

    def _check_pad_and_think(self) -> None:
        """Pad tokens may differ, as they are never trained on; an extended think token cuts every thought."""
        ours, theirs = self.student, self.teacher
        if ours.pad_id != theirs.pad_id:
            self.notes.append(
                f"the student pads with {ours.name(ours.pad_id)}, the teacher with {theirs.name(theirs.pad_id)}; each "
                "takes its own"
            )
        extended = [token_id for token_id in ours.think_ids if token_id in self.extended]
        if extended:
            self.notes.append(
                f"the think tokens {', '.join(map(ours.name, extended))} are extended: the teacher lacks them, and "
                "nothing behind them is trained"
            )

    def _check_texts(self) -> None:
        """Both turn plain text into the same ids; text that becomes extended ids is noted."""
        self.text_probes, differences, parts = compare_texts(self.student.tokenizer, self.teacher.tokenizer)
        extended, missing = set(self.extended), set(self.missing)
        turned = [d for d in differences if extended.intersection(d.student or ())]
        plain = [d for d in differences if d not in turned and not missing.intersection(d.teacher or ())]
        if plain:
            where = f" (different {' and '.join(parts)})" if parts else ""
            self.problems.append(
                f"equal ids, but {len(plain)} of {self.text_probes} probe texts are cut up differently{where}: "
                f"{plain[0].probe[:40]!r} gives {_first_difference(plain[0], self.student, self.teacher)}; use one "
                "tokenizer for both, with the student's own tokens added to it"
            )
        elif parts and not differences:
            self.notes.append(f"the tokenizers have a different {' and '.join(parts)}, which no probe text shows")
        if turned:
            self.notes.append(
                f"plain text becomes extended ids: {turned[0].probe[:40]!r} holds ids from {self.first} on for the "
                "student"
            )


def _first_difference(difference: Difference, student: ModelVocabulary, teacher: ModelVocabulary) -> str:
    """The first ids that differ, with their tokens."""
    place = difference.position

    def token(ids: tuple[int, ...] | None, side: ModelVocabulary) -> str:
        if ids is None:
            return "nothing (the template refuses it)"
        return side.name(ids[place]) if place < len(ids) else "the end"

    return (
        f"{token(difference.student, student)} for the student and {token(difference.teacher, teacher)} for the "
        f"teacher at token {place}"
    )


def _show(ids: Iterable[int]) -> str:
    return show_ranges(to_ranges(ids))

"""What makes a pair sound.

In: both sides, what their ids have in common, and the threshold. Out: problems, which stop a run, and notes. A problem
names the first ids and tokens concerned and what to set.
"""

from dataclasses import dataclass, field

from verl.utils.vocab.id_ranges import IdRange, show_ranges, to_ranges
from verl.utils.vocab.probes import CHATS, Difference, compare_chats, compare_texts
from verl.utils.vocab.side import Side

START_KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"
STUDENT_KEY = "actor_rollout_ref.model"
TEACHER_KEY = "actor_rollout_ref.ref.model"


@dataclass
class Findings:
    """What the rules found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_probes: int = 0
    chat_probes: int = 0


@dataclass(frozen=True)
class IdComparison:
    """Two vocabularies, id by id."""

    shared: frozenset[int]
    """Ids of the same token."""
    differing: tuple[int, ...]
    """Ids that both name, differently."""
    extended: tuple[int, ...]
    """E: ids that the student alone names."""
    missing: tuple[int, ...]
    """Ids that the teacher alone names."""

    @property
    def start(self) -> int | None:
        """The first id of E."""
        return self.extended[0] if self.extended else None


def compare_ids(student: dict[int, str], teacher: dict[int, str]) -> IdComparison:
    """Sort the ids of both by who names them, and how."""
    common = student.keys() & teacher.keys()
    shared = frozenset(token_id for token_id in common if student[token_id] == teacher[token_id])
    return IdComparison(
        shared=shared,
        differing=tuple(sorted(common - shared)),
        extended=tuple(sorted(student.keys() - teacher.keys())),
        missing=tuple(sorted(teacher.keys() - student.keys())),
    )


def apply_rules(student: Side, teacher: Side, ids: IdComparison, start: int | None) -> Findings:
    """Everything that is wrong with the pair, or worth knowing.

    Args:
        ids: both vocabularies compared.
        start: the threshold in force; None: no extension.
    """
    found = Findings()
    check_shared_tokens(student, teacher, ids, found)
    check_runs_of_ids(student, teacher, ids, found)
    # Where tokens differ, the rules behind an `if` would say what follows from that, and their advice lead astray.
    if not ids.differing:
        check_threshold(student, teacher, ids, start, found)
    check_rows(student, teacher, found)
    check_end_tokens(student, teacher, ids, found)
    check_templates(student, teacher, found)
    if not ids.differing:
        check_pad_and_think(student, teacher, ids, found)
        check_texts(student, teacher, ids, found)
    return found


def check_shared_tokens(student: Side, teacher: Side, ids: IdComparison, found: Findings) -> None:
    """Wherever both name an id, they mean the same token."""
    if ids.differing:
        first, many = ids.differing[0], len(ids.differing)
        common = many + len(ids.shared)
        cause = "another family's tokenizer" if many > common / 2 else "not the tokenizer the student grew from"
        found.problems.append(
            f"id {first} is {student.tokens[first]!r} to the student and {teacher.tokens[first]!r} to the teacher, and "
            f"{many:,} of the {common:,} ids that both name differ ({_show(ids.differing)}): {cause}; give "
            f"{TEACHER_KEY}.path the model that the student extends, or correct {STUDENT_KEY}.tokenizer_path or "
            f"{TEACHER_KEY}.tokenizer_path"
        )
    if ids.missing and not ids.differing:
        first = ids.missing[0]
        found.notes.append(
            f"the teacher names {len(ids.missing):,} ids that the student lacks ({_show(ids.missing)}; first "
            f"{teacher.tokens[first]!r}): what it expects there, the student cannot write"
        )


def check_runs_of_ids(student: Side, teacher: Side, ids: IdComparison, found: Findings) -> None:
    """Ids are one run from 0, and E its tail: masks go by ``id >= start``, the softmax by the number of ids."""
    for side in (student, teacher):
        if side.facts.gaps:
            found.problems.append(
                f"the {side.role}'s tokenizer names {side.facts.ids:,} ids with a gap ({show_ranges(side.facts.gaps)} "
                f"name nothing), and a run takes its ids to be 0-{side.facts.ids - 1}: ids from {side.facts.ids} on "
                "would never be sampled or scored; number the tokens without gaps, or name the free ids"
            )
    behind = max(teacher.tokens.keys() & student.tokens.keys(), default=-1)
    if ids.start is not None and behind > ids.start:
        found.problems.append(
            f"the extended ids {_show(ids.extended)} are not one tail: id {behind} {student.tokens[behind]!r}, behind "
            f"{ids.start} {student.tokens[ids.start]!r}, is the teacher's too, and masks go by id >= {START_KEY}; "
            "append the student's own tokens after all of the teacher's"
        )


def check_threshold(student: Side, teacher: Side, ids: IdComparison, start: int | None, found: Findings) -> None:
    """The threshold is the first extended id."""
    first = ids.start
    if first is None:
        _check_without_extension(student, teacher, start, found)
    elif start is None or start > first:
        between = tuple(token_id for token_id in ids.extended if start is None or token_id < start)
        found.problems.append(
            f"{START_KEY}={'null' if start is None else start}: ids {_show(between)} (first "
            f"{student.tokens[first]!r}), which the teacher lacks, are neither shared nor extended; set "
            f"{START_KEY}={first}, or auto"
        )
    elif start < first:
        lost = tuple(token_id for token_id in ids.shared if token_id >= start)
        known = f"first {student.tokens[start]!r}" if start in student.tokens else "named by neither"
        found.problems.append(
            f"{START_KEY}={start} lies inside the shared vocabulary: ids {_show(lost)} ({known}), which the teacher "
            f"knows, would count as extended and never be scored; set {START_KEY}={first}, or auto"
        )


def _check_without_extension(student: Side, teacher: Side, start: int | None, found: Findings) -> None:
    size = student.facts.ids
    if start is not None and start < size:
        found.problems.append(
            f"{START_KEY}={start} lies inside the shared vocabulary: the student has no id that the teacher lacks, and "
            f"ids {start}-{size - 1} (first {student.name(start)}) would never be scored; set {START_KEY}=null, or auto"
        )
    elif start is not None:
        found.notes.append(f"{START_KEY}={start} marks nothing: the student has no id that the teacher lacks")
    elif student.tokens == teacher.tokens:
        found.notes.append("student and teacher name the same ids: no extension, and no threshold is needed")


def check_rows(student: Side, teacher: Side, found: Findings) -> None:
    """Every id has an embedding row, and the model loads."""
    for side, key in ((student, STUDENT_KEY), (teacher, TEACHER_KEY)):
        found.problems.extend(side.problems)
        found.notes.extend(side.notes)
        facts, rows = side.facts, side.facts.rows
        if rows is not None and rows < facts.ids:
            found.problems.append(
                f"the {side.role} has {rows:,} embedding rows ({facts.rows_source}) and its tokenizer names "
                f"{facts.ids:,} ids: {IdRange(rows, facts.ids - 1)} (first {side.name(rows)}) have no row; resize the "
                f"model's embedding to {facts.ids}, or give {key}.tokenizer_path the tokenizer that belongs to it"
            )


def check_end_tokens(student: Side, teacher: Side, ids: IdComparison, found: Findings) -> None:
    """Answers end where the teacher ends them.

    An end of the teacher's that does not stop the student's engine is what the student learns to write, and then it
    writes on, into a context that the teacher has never seen. The other way round, an answer is merely cut.
    """
    ours, theirs = student.facts, teacher.facts
    if ours.eos_id != theirs.eos_id:
        if ids.differing and ours.eos_token == theirs.eos_token:
            return  # one token at two ids, as has been said
        found.problems.append(
            f"the student's end token is {student.name(ours.eos_id)} and the teacher's {teacher.name(theirs.eos_id)}; "
            f"set eos_token of {ours.tokenizer}/tokenizer_config.json to the teacher's"
        )
        return
    if ours.end_ids is None or theirs.end_ids is None:
        return
    running_on = [token_id for token_id in theirs.end_ids if token_id not in ours.end_ids]
    if running_on:
        found.problems.append(
            f"the teacher ends an answer at {', '.join(map(teacher.name, running_on))} too, and the student's engine "
            f"stops at {', '.join(map(str, ours.end_ids)) or 'none'} only; add it to eos_token_id in "
            f"{ours.model}/generation_config.json"
        )
    cut = [token_id for token_id in ours.end_ids if token_id not in theirs.end_ids]
    if cut:
        found.notes.append(f"the student's engine also stops at {', '.join(map(student.name, cut))}, the teacher not")


def check_pad_and_think(student: Side, teacher: Side, ids: IdComparison, found: Findings) -> None:
    """Pad tokens may differ, as they are never trained on; a think token that is extended cuts every thought."""
    if student.facts.pad_id != teacher.facts.pad_id:
        found.notes.append(
            f"the student pads with {student.name(student.facts.pad_id)}, the teacher with "
            f"{teacher.name(teacher.facts.pad_id)}; each takes its own"
        )
    extended = [token_id for token_id in student.facts.think_ids if token_id in ids.extended]
    if extended:
        found.notes.append(
            f"the think tokens {', '.join(map(student.name, extended))} are extended: the teacher lacks them, and "
            "nothing behind them is trained"
        )


def check_texts(student: Side, teacher: Side, ids: IdComparison, found: Findings) -> None:
    """Both turn plain text into the same ids. Text that becomes extended ids is the student's own affair."""
    compared = compare_texts(student.tokenizer, teacher.tokenizer)
    found.text_probes = compared.probes
    extended, missing = set(ids.extended), set(ids.missing)
    turned = [d for d in compared.differences if extended.intersection(d.student or ())]
    plain = [d for d in compared.differences if d not in turned and not missing.intersection(d.teacher or ())]
    where = f" (different {' and '.join(compared.parts)})" if compared.parts else ""
    if plain:
        found.problems.append(
            f"equal ids, but {len(plain)} of {compared.probes} probe texts are cut up differently{where}: "
            f"{plain[0].probe[:40]!r} gives {_parting(plain[0], student, teacher)}; use one tokenizer for both, with "
            "the student's own tokens added to it"
        )
    elif compared.parts and not compared.differences:
        found.notes.append(f"the tokenizers have a different {' and '.join(compared.parts)}, which no probe text shows")
    if turned:
        found.notes.append(
            f"plain text becomes extended ids: {turned[0].probe[:40]!r} holds ids from {ids.start} on for the student"
        )


def check_templates(student: Side, teacher: Side, found: Findings) -> None:
    """Both templates make the same ids of a chat."""
    ours, theirs = student.tokenizer.chat_template, teacher.tokenizer.chat_template
    if not ours:
        found.problems.append(
            f"the student's tokenizer has no chat template, and prompts are chats; copy the teacher's "
            f"chat_template.jinja to {student.facts.tokenizer}"
        )
    if not theirs:
        found.notes.append("the teacher's tokenizer has no chat template: it may never have seen a chat")
    if not ours or not theirs:
        return
    found.chat_probes = len(CHATS)
    differences = compare_chats(student.tokenizer, teacher.tokenizer)
    if differences:
        first, others = differences[0], [difference.probe for difference in differences[1:]]
        also = f" (so do: {', '.join(others)})" if others else ""
        found.problems.append(
            f"the chat templates give different ids for the chat '{first.probe}'{also}: "
            f"{_parting(first, student, student)}; copy {teacher.facts.tokenizer}/chat_template.jinja to the student's "
            "tokenizer, or the other way round"
        )
    elif ours != theirs:
        found.notes.append(f"the chat templates differ in text, but not in the ids of {len(CHATS)} probe chats")


def _parting(difference: Difference, student: Side, teacher: Side) -> str:
    """The first ids that differ."""
    place = difference.position

    def token(ids: tuple[int, ...] | None, side: Side) -> str:
        if ids is None:
            return "nothing (the template refuses it)"
        return side.name(ids[place]) if place < len(ids) else "the end"

    return (
        f"{token(difference.student, student)} for the student and {token(difference.teacher, teacher)} for the "
        f"teacher at token {place}"
    )


def _show(ids: tuple[int, ...]) -> str:
    return show_ranges(to_ranges(ids))

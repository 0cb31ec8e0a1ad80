"""What makes a pair of student and teacher sound.

In: both vocabularies and the threshold. Out: ``VocabContract``: what the two share, problems, which stop a run, and
notes. A problem names the first ids and tokens concerned and what to set.

Equal vocabularies do not make equal tokenizers: merges, normalisation and the cutting into words decide which tokens
a text becomes, and the chat template decides what a conversation looks like. Text in tokens that a teacher was not
trained on gets wrong scores. So both also encode probe texts and chats (``vocab_probes.json``).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from verl.utils.vocab_models import ModelVocabulary, show_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"
MODEL_KEYS = {"student": "actor_rollout_ref.model", "teacher": "actor_rollout_ref.ref.model"}
MOST_PROBES_OF_A_KIND = 500
PROBES: dict[str, list[Any]] = json.loads(Path(__file__).with_name("vocab_probes.json").read_text(encoding="utf-8"))
"""``texts``, and ``chats``: ``name``, ``messages``, and where they are not the usual ones ``tools``, ``options`` of the
template and ``add_generation_prompt``."""


class Difference(NamedTuple):
    """A probe that student and teacher turn into different ids."""

    probe: str
    """The text, or the name of the chat."""
    student: list[int]
    """Ids of the student; empty where its template refuses the chat."""
    teacher: list[int]
    """Ids of the teacher; of chats, the teacher's text in the student's ids."""


@dataclass
class VocabContract:
    """What two models share, and whether a threshold describes it.

    B = ids that both tokenizers name, E = ids that the student's alone names. A threshold describes the pair where
    ``id >= threshold`` means the same as "in E".

    Args:
        start: the threshold; None: no extension; ``auto``: the first id of E.
    """

    student: ModelVocabulary
    teacher: ModelVocabulary
    start: InitVar[int | str | None]
    extend_start: int | None = field(init=False)
    """First extended id: the one set, or derived for ``auto``. None: no extension."""
    shared: list[int] = field(init=False)
    """Ids of the same token, in order, as all lists of ids here."""
    extended: list[int] = field(init=False)
    """E."""
    problems: list[str] = field(init=False)
    """Why the pair must not be trained as it is, each with what to set."""
    notes: list[str] = field(init=False)
    """What a user should know and may have meant."""

    def __post_init__(self, start: int | str | None) -> None:
        ours, theirs = self.student.tokens, self.teacher.tokens
        common = sorted(ours.keys() & theirs.keys())
        self.shared = [token_id for token_id in common if ours[token_id] == theirs[token_id]]
        self.extended = sorted(ours.keys() - theirs.keys())
        self.extend_start = self.derived_start if isinstance(start, str) else start
        self.notes = [*self.student.notes, *self.teacher.notes]
        self.problems = [*self.student.problems, *self.teacher.problems, *self._row_problems()]
        differing = [token_id for token_id in common if ours[token_id] != theirs[token_id]]
        if differing:
            # Other rules would report what follows from this, and advise wrongly.
            first, teacher_key = differing[0], MODEL_KEYS["teacher"]
            self.problems.insert(
                0,
                f"id {first} is {ours[first]!r} to the student and {theirs[first]!r} to the teacher, and "
                f"{len(differing):,} of the {len(common):,} ids that both name differ ({show_ids(differing)}); give "
                f"{teacher_key}.path the model that the student extends, or correct tokenizer_path",
            )
            return
        rules = (self._threshold_problems, self._end_problems, self._chat_problems, self._text_problems)
        for rule in (*rules, self._item_problems):
            self.problems += rule()
        if extended := [token_id for token_id in self.student.think_ids if token_id in self.extended]:
            names = ", ".join(map(self.student.name, extended))
            self.notes.append(f"the think tokens {names} are extended: nothing after them is trained")

    @property
    def verdict(self) -> str:
        """``unsound`` (with problems), ``sound with notes`` or ``sound``."""
        return "unsound" if self.problems else "sound with notes" if self.notes else "sound"

    @property
    def derived_start(self) -> int | None:
        """First id of E; None: there is none."""
        return self.extended[0] if self.extended else None

    @property
    def collisions(self) -> list[int]:
        """Ids of E that fall on padded rows of the teacher, which takes them without an error."""
        return [token_id for token_id in self.extended if token_id < (self.teacher.rows or 0)]

    @property
    def fingerprint(self) -> str:
        """Of the shared tokens and the threshold: equal where two runs mean the same by both."""
        digest = hashlib.sha256(f"start {self.extend_start}".encode())
        for token_id in self.shared:
            digest.update(f"\n{token_id} {self.student.tokens[token_id]!r}".encode())
        return digest.hexdigest()[:16]

    def _row_problems(self) -> Iterator[str]:
        """Every id has an embedding row."""
        for side in (self.student, self.teacher):
            if side.rows is not None and side.rows < side.ids:
                yield (
                    f"the {side.role} has {side.rows:,} embedding rows and its tokenizer names {side.ids:,} ids: "
                    f"{show_ids(range(side.rows, side.ids))} (first {side.name(side.rows)}) have no row; resize the "
                    f"model's embedding, or give {MODEL_KEYS[side.role]}.tokenizer_path the model's own tokenizer"
                )

    def _threshold_problems(self) -> Iterator[str]:
        """The threshold is the first id of E, which is the tail of all ids: no tokenizer has a gap."""
        start, first = self.extend_start, self.derived_start
        lost = [token_id for token_id in self.shared if start is not None and token_id >= start]
        unmarked = [token_id for token_id in self.extended if start is None or token_id < start]
        for ids, what in (
            (lost, "lie inside the shared vocabulary and would never be scored"),
            (unmarked, "which the teacher lacks, are neither shared nor extended"),
        ):
            if ids:
                setting, fix = ("null" if value is None else value for value in (start, first))
                yield (
                    f"{START_KEY}={setting}: ids {show_ids(ids)} (first {self.student.name(ids[0])}), {what}; set "
                    f"{START_KEY}={fix}, or auto"
                )
        if first is None and start is not None and not lost:
            self.notes.append(f"{START_KEY}={start} marks nothing: the student has no id that the teacher lacks")

    def _item_problems(self) -> Iterator[str]:
        """Text that holds an extended token becomes its id, and the id becomes that text again."""
        tokenizer, lost, changed = self.student.tokenizer, [], []
        added = tokenizer.added_tokens_decoder
        for token_id in [token_id for token_id in self.extended if token_id in added][:MOST_PROBES_OF_A_KIND]:
            text = f"a {added[token_id]}{added[token_id]} b"
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids.count(token_id) != 2:
                lost.append(token_id)
            elif (back := tokenizer.decode(ids)) != text:
                changed.append(f"{text!r} comes back as {back!r}")
        if lost:
            yield (
                f"{len(lost)} extended tokens (first {self.student.name(lost[0])}) become other ids in a text; set "
                f"single_word and normalized of them to false in {self.student.tokenizer_path}/tokenizer.json"
            )
        if changed:
            self.notes.append(f"{len(changed)} extended tokens change a text (lstrip, rstrip?): {changed[0]}")

    def _end_problems(self) -> Iterator[str]:
        """The student's engine stops where the teacher ends an answer.

        Else the student learns to write the teacher's end token and then writes on, in a context that the teacher has
        never seen. The other way round an answer is merely cut.
        """
        ours, theirs = self.student, self.teacher
        end, their_end = ours.tokenizer.eos_token_id, theirs.tokenizer.eos_token_id
        missing = [token_id for token_id in theirs.end_ids if token_id not in ours.end_ids]
        if end != their_end:
            yield (
                f"the student's end token is {ours.name(end)} and the teacher's {theirs.name(their_end)}; set "
                f"eos_token of {ours.tokenizer_path}/tokenizer_config.json to the teacher's"
            )
        elif missing:
            yield (
                f"the teacher also ends an answer at {', '.join(map(theirs.name, missing))}, where the student's "
                f"engine writes on; add it to eos_token_id in {ours.model}/generation_config.json"
            )

    def _chat_problems(self) -> Iterator[str]:
        """Both templates make the same ids of a chat."""
        ours, theirs = self.student.tokenizer, self.teacher.tokenizer
        if not ours.chat_template:
            yield (
                "the student's tokenizer has no chat template, and prompts are chats; copy the teacher's "
                f"chat_template.jinja to {self.student.tokenizer_path}"
            )
        elif not theirs.chat_template:
            self.notes.append("the teacher's tokenizer has no chat template: it may never have seen a chat")
        elif differences := compare_chats(ours, theirs):
            yield (
                f"the chat templates give different ids for the chats {', '.join(each.probe for each in differences)}: "
                f"{self._describe(differences[0])}; copy {self.teacher.tokenizer_path}/chat_template.jinja to the "
                "student's tokenizer, or the other way round"
            )

    def _text_problems(self) -> Iterator[str]:
        """Both turn plain text into the same ids; text that becomes extended ids is noted."""
        differences, parts = compare_texts(self.student.tokenizer, self.teacher.tokenizer)
        extended, missing = set(self.extended), self.teacher.tokens.keys() - self.student.tokens.keys()
        turned = [each for each in differences if extended.intersection(each.student)]
        plain = [each for each in differences if each not in turned and not missing.intersection(each.teacher)]
        where = f"different {' and '.join(parts)}"
        if plain:
            yield (
                f"equal ids, but {len(plain)} probe texts are cut up differently ({where}): {plain[0].probe[:40]!r} "
                f"gives {self._describe(plain[0])}; use one tokenizer for both, with the student's own tokens added"
            )
        elif parts and not differences:
            self.notes.append(f"the tokenizers have a {where}, which no probe text shows")
        if turned:
            self.notes.append(f"plain text becomes extended ids: {turned[0].probe[:40]!r} holds some for the student")

    def _describe(self, difference: Difference) -> str:
        """The first ids that differ, with their tokens."""
        pairs = enumerate(zip_longest(difference.student, difference.teacher))
        place, ids = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        student, teacher = map(self.student.name, ids)
        return f"{student} for the student and {teacher} for the teacher at token {place}"


def compare_texts(
    student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase"
) -> tuple[list[Difference], list[str]]:
    """Encode the probe texts, every added token, and texts that test merges which differ.

    Returns:
        the texts with different ids, and which parts of the tokenizers are defined differently (``normalizer``,
        ``pre_tokenizer``, ``merges``).
    """
    parts, merged = _compare_definitions(student, teacher)
    added = [str(token) for token in teacher.added_tokens_decoder.values()]
    # Between blanks and within a word: added tokens may take blanks beside them along, or match whole words only.
    texts = [*PROBES["texts"], *(f"a {token} b{token}c" for token in added[:MOST_PROBES_OF_A_KIND])]
    texts += [teacher.convert_tokens_to_string([token]) for token in merged[:MOST_PROBES_OF_A_KIND]]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    probes = (Difference(text, *pair) for text, *pair in zip(texts, *ids, strict=True))
    return [probe for probe in probes if probe.student != probe.teacher], parts


def compare_chats(student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase") -> list[Difference]:
    """Render the probe chats with both templates and encode the results with the student's tokenizer.

    A chat that both templates refuse counts as equal. Both tokenizers need a template.
    """

    def ids_of(tokenizer: "PreTrainedTokenizerBase", chat: dict[str, Any]) -> list[int]:
        options = {"add_generation_prompt": chat.get("add_generation_prompt", True), **chat.get("options", {})}
        try:
            text = tokenizer.apply_chat_template(chat["messages"], tools=chat.get("tools"), tokenize=False, **options)
        except (TemplateError, TypeError, ValueError):  # what templates raise on roles and tools they do not know
            return []
        return student.encode(text, add_special_tokens=False)

    probes = (Difference(chat["name"], ids_of(student, chat), ids_of(teacher, chat)) for chat in PROBES["chats"])
    return [probe for probe in probes if probe.student != probe.teacher]


def _compare_definitions(
    student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase"
) -> tuple[list[str], list[str]]:
    """Names of the parts that differ, and tokens whose merges differ: first those that one side alone merges."""
    from transformers import PreTrainedTokenizerFast

    backends = [each.backend_tokenizer for each in (student, teacher) if isinstance(each, PreTrainedTokenizerFast)]
    if len(backends) < 2:
        return [], []
    states = {
        # The parts themselves compare by identity, the bytes that pickle would write by content.
        name: [part.__getstate__() if (part := getattr(backend, name)) else b"" for backend in backends]
        for name in ("normalizer", "pre_tokenizer", "model")
    }
    models = states.pop("model")
    parts = [name for name, (ours, theirs) in states.items() if ours != theirs]
    if models[0] == models[1]:
        return parts, []
    # Only now parsed: the definition of a large vocabulary is megabytes of JSON.
    first, second = ([tuple(merge) for merge in json.loads(model).get("merges", [])] for model in models)
    alone = set(first) ^ set(second)
    merges = [merge for merge in (*first, *second) if merge in alone]
    merges += [merge for pair in zip(first, second, strict=False) if pair[0] != pair[1] for merge in pair]
    return [*parts, "merges"] if first != second else parts, ["".join(merge) for merge in merges]

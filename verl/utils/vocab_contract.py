"""What student and teacher share, established before a run and enforced.

::

    python -m verl.utils.vocab_contract --student MODEL --teacher MODEL [--extend-vocab-start-token N|auto] [--json]

In: two models (folders or hub names) and the threshold. Out: a ``VocabContract`` with a verdict: sound, sound with
notes, or unsound with what to set. Compared are the tokenizers, id by id and on probe texts and chats, the end
tokens, and the rows of the embeddings. Weights are not loaded, only the headers of their files are read. The rules are
in ``vocab_rules``.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.console import command_parser, escape_unknown_characters
from verl.utils.vocab_models import read_vocabulary, show_ids, to_ranges
from verl.utils.vocab_rules import VocabContract

logger = logging.getLogger(__name__)

AUTO = "auto"


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
    return VocabContract(ours, theirs, extend_vocab_start_token)


def enforce(contract: VocabContract, mode: str, pair: str = "student and teacher") -> None:
    """Report the contract, and stop a run whose pair is unsound.

    Args:
        mode: ``trainer.vocab_check``: ``strict`` stops, ``warn`` only logs.
        pair: the two, for messages.

    Raises:
        ValueError: the pair is unsound and ``mode`` is strict; a line each for what is wrong and what to set.
    """
    if not contract.problems:
        logger.info("the vocabularies of %s\n%s", pair, render(contract))
    elif mode == "strict":
        what = f"{pair} do not fit together (trainer.vocab_check=warn would train them all the same):"
        raise ValueError("\n".join((what, *(f"- {problem}" for problem in contract.problems))))
    else:
        logger.warning("trainer.vocab_check=%s lets an unsound pair pass: %s\n%s", mode, pair, render(contract))


def as_dict(contract: VocabContract) -> dict[str, Any]:
    """Everything as JSON takes it; ranges are pairs of a first and a last id."""
    return {
        "verdict": contract.verdict,
        "student": contract.student.as_dict(),
        "teacher": contract.teacher.as_dict(),
        "extend_start": contract.extend_start,
        "shared_ids": len(contract.shared),
        "extended": to_ranges(contract.extended),
        "extended_ids": len(contract.extended),
        "collisions": to_ranges(contract.collisions),
        "colliding_ids": len(contract.collisions),
        "fingerprint": contract.fingerprint,
        "problems": contract.problems,
        "notes": contract.notes,
    }


def render(contract: VocabContract) -> str:
    """The contract as a table, problems and notes below."""
    mine, theirs = contract.student.as_dict(), contract.teacher.as_dict()
    width = max(len(str(value)) for value in mine.values())
    lines = [f"{'verdict':12}{contract.verdict.upper()}", f"{'':12}{'STUDENT':{width}}  TEACHER"]
    lines += [f"{name:12}{value!s:{width}}  {theirs[name]}" for name, value in mine.items()]
    lines.append(f"{'shared':12}{len(contract.shared):,} ids name the same token")
    extended, collisions = contract.extended, contract.collisions
    if extended:
        some = ", ".join(map(contract.student.name, dict.fromkeys([*extended[:3], extended[-1]])))
        lines.append(f"{'extended':12}{show_ids(extended)}: {len(extended):,} ids that the teacher lacks ({some})")
    if collisions:
        where = f"{len(collisions):,} of them ({show_ids(collisions)})"
        lines.append(f"{'':12}{where} fall on padded rows of the teacher")
    lines.append(f"{'threshold':12}{contract.extend_start}; fingerprint {contract.fingerprint}")
    lines += [f"{'problem':12}{problem}" for problem in contract.problems]
    return "\n".join([*lines, *(f"{'note':12}{note}" for note in contract.notes)])


def threshold(text: str) -> int | str | None:
    """``--extend-vocab-start-token``: a number, ``auto`` or ``null``."""
    return {AUTO: AUTO, "null": None}[text] if text in (AUTO, "null") else int(text)


THRESHOLD_HELP = "first extended id, or auto: the first that the tokenizer of --teacher lacks"


def resolve_threshold(given: int | str | None, student: str, teacher: str | None) -> int | None:
    """The first extended id that a command's ``--extend-vocab-start-token`` stands for; None: there is no extension.

    Raises:
        ValueError: it is ``auto``, and no teacher is named or the two do not fit together; or the ids below it are not
            those that the student shares with the teacher that is named.
    """
    option = f"--extend-vocab-start-token {'null' if given is None else given}"
    if teacher is None:
        if given == AUTO:
            raise ValueError(f"{option} compares two tokenizers; name the teacher's with --teacher, or give the id")
        return None if given is None else int(given)
    contract = read_contract(student, teacher)
    if given == AUTO and contract.problems:
        why = "".join(f"\n- {problem}" for problem in contract.problems)
        raise ValueError(f"{option}: {student} and {teacher} do not fit; give the id:{why}")
    start = contract.extend_start if given == AUTO else given
    below = (token_id for token_id in contract.student.tokens if start is None or token_id < int(start))
    if differing := set(below).symmetric_difference(contract.shared):
        where = f"{contract.student.name(min(differing))} is on the wrong side; {contract.extend_start} would be right"
        raise ValueError(f"{option}: the ids below it have to be those that {student} and {teacher} share; {where}")
    return None if start is None else int(start)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    escape_unknown_characters()
    parser = command_parser(
        "verl.utils.vocab_contract",
        "Compare the vocabularies of a student and its teacher.",
        epilog="Exit code: 0 sound, 1 unsound, 2 could not be compared.",
    )
    for role in ("student", "teacher"):
        parser.add_argument(f"--{role}", required=True, metavar="MODEL", help="folder or hub name")
        parser.add_argument(f"--{role}-tokenizer", metavar="FOLDER", help="where it is not the model's")
    threshold_help = "threshold to check: a number, null (no extension) or auto (derived; the default)"
    parser.add_argument("--extend-vocab-start-token", type=threshold, default=AUTO, metavar="N", help=threshold_help)
    parser.add_argument("--trust-remote-code", action="store_true", help="run tokenizer code that ships with a model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    try:
        contract = read_contract(**arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_dict(contract), indent=2) if as_json else render(contract))
    return int(bool(contract.problems))


if __name__ == "__main__":
    sys.exit(main())

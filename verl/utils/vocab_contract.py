"""What student and teacher share, established before a run and enforced.

::

    python -m verl.utils.vocab_contract --student MODEL --teacher MODEL [--extend-vocab-start-token N|auto] [--json]

In: two models (folders or hub names) and the threshold. Out: a ``VocabContract`` with a verdict: sound, sound with
notes, or unsound with what to set. Compared are the tokenizers, id by id and on probe texts and chats, the end, pad
and think tokens, and the rows of the embeddings. Weights are not loaded, only the headers of their files are read.

B = ids that both tokenizers name, E = ids that the student's alone names. A threshold describes the pair where
``id >= threshold`` says the same as "in E". The parts are in ``verl/utils/vocab``.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.vocab.contract import Verdict, VocabContract
from verl.utils.vocab.id_ranges import to_ranges
from verl.utils.vocab.report import render
from verl.utils.vocab.rules import apply_rules, compare_ids
from verl.utils.vocab.side import Side, read_side

__all__ = ["Verdict", "VocabContract", "compare_sides", "enforce", "read_contract", "render"]

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
        overrides: entries laid over both models' config.json.

    Raises:
        ValueError: a tokenizer is missing, or a file is broken. An unsound pair is a verdict, not an error.
    """
    return compare_sides(
        read_side("student", student, student_tokenizer, trust_remote_code, overrides),
        read_side("teacher", teacher, teacher_tokenizer, trust_remote_code, overrides),
        extend_vocab_start_token,
    )


def compare_sides(student: Side, teacher: Side, extend_vocab_start_token: int | str | None) -> VocabContract:
    """The contract of two models that were read; see ``read_contract``."""
    ids = compare_ids(student.tokens, teacher.tokens)
    # "auto" is the only text that the configuration and the command line let through.
    start = ids.start if isinstance(extend_vocab_start_token, str) else extend_vocab_start_token
    found = apply_rules(student, teacher, ids, start)
    return VocabContract(
        student=student.facts,
        teacher=teacher.facts,
        extend_start=start,
        derived_start=ids.start,
        shared_ids=len(ids.shared),
        extended=to_ranges(ids.extended),
        text_probes=found.text_probes,
        chat_probes=found.chat_probes,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        fingerprint=_fingerprint({token_id: student.tokens[token_id] for token_id in ids.shared}, start),
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


def _fingerprint(shared: Mapping[int, str], start: int | None) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the threshold and the shared tokens with their ids."""
    digest = hashlib.sha256(f"start {start}".encode())
    for token_id in sorted(shared):
        digest.update(f"\n{token_id} {shared[token_id]!r}".encode())
    return digest.hexdigest()[:16]


def _threshold(text: str) -> int | str | None:
    """``--extend-vocab-start-token``: a number, ``auto`` or ``null``."""
    if text in (AUTO, "null"):
        return AUTO if text == AUTO else None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of a whole number from 1 on, auto and null")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_args(argv)
    try:
        contract = read_contract(
            args.student,
            args.teacher,
            args.extend_vocab_start_token,
            student_tokenizer=args.student_tokenizer,
            teacher_tokenizer=args.teacher_tokenizer,
            trust_remote_code=args.trust_remote_code,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(contract.as_dict(), indent=2, ensure_ascii=False) if args.json else render(contract))
    return int(contract.verdict is Verdict.UNSOUND)


if __name__ == "__main__":
    sys.exit(main())

"""Checks the vocabularies of a run's models before anything reads the threshold.

In: the configuration. Out: what student and teacher share, and the id in the place of
``extend_vocab_start_token=auto``. How two vocabularies are compared is in ``verl.utils.vocab_contract``.
"""

import logging

from verl.config import PPOConfig
from verl.utils.vocab_contract import VocabContract, enforce, read_contract

logger = logging.getLogger(__name__)


def resolve_vocabulary(config: PPOConfig) -> VocabContract | None:
    """Check that the vocabularies fit together, and put the id in the place of ``extend_vocab_start_token=auto``.

    Returns:
        what the two models share; None where there is no teacher of its own, or ``trainer.vocab_check=off``.

    Raises:
        ValueError: a tokenizer is missing, or under ``trainer.vocab_check=strict`` the two do not fit.
    """
    teacher, rollout = config.actor_rollout_ref.ref.model, config.actor_rollout_ref.rollout
    mode, distill = str(config.trainer.vocab_check), config.algorithm.distill
    if not teacher.path:
        if rollout.extend_vocab_start_token == "auto":
            config.resolve_extend_start(None)  # the student's own starting weights are the reference
        return None
    if mode == "off":
        return None
    contract = _read(config, teacher.path, rollout.extend_vocab_start_token, teacher.tokenizer_path)
    enforce(contract, mode)
    config.resolve_extend_start(contract.extend_start)
    if (distill.topk_or_none or 0) > contract.shared_ids:
        raise ValueError(
            f"algorithm.distill.topk={distill.topk} is more than the {contract.shared_ids} ids that student and "
            "teacher share; lower it, or set algorithm.distill.objective=exact for all of them"
        )
    for name, further in distill.teachers.items():
        if further.path is not None:
            _check_further_teacher(config, name, mode)
    return contract


def _read(
    config: PPOConfig, teacher: str, start: int | str | None, teacher_tokenizer: str | None = None
) -> VocabContract:
    model = config.actor_rollout_ref.model
    return read_contract(
        str(model.path),
        teacher,
        start,
        student_tokenizer=model.tokenizer_path,
        teacher_tokenizer=teacher_tokenizer,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )


def _check_further_teacher(config: PPOConfig, name: str, mode: str) -> None:
    """Check that a teacher of ``algorithm.distill.teachers`` knows what its ``vocabulary`` claims.

    Raises:
        ValueError: under ``trainer.vocab_check=strict``, it does not fit the student. Where only its ``vocabulary`` is
            wrong, the first line is the setting to change.
    """
    teacher, start = config.algorithm.distill.teachers[name], config.actor_rollout_ref.rollout.extend_start
    contract = _read(config, str(teacher.path), None if teacher.knows_extended else start)
    knows_extended = _knows_extended(contract, start)
    key = f"algorithm.distill.teachers.{name}"
    if knows_extended is not None and knows_extended != teacher.knows_extended:
        # Compared anew as it will be with the right setting: else half of the problems would be about the wrong one.
        contract = _read(config, str(teacher.path), None if knows_extended else start)
        advice = (
            f"set {key}.vocabulary={'full' if knows_extended else 'base'}: {key}.path={teacher.path} "
            f"{'knows' if knows_extended else 'lacks'} the item tokens, and vocabulary={teacher.vocabulary} says "
            "otherwise"
        )
        if mode == "strict":
            raise ValueError("\n".join((advice, *(f"- {problem}" for problem in contract.problems))))
        logger.warning(advice)
    try:
        enforce(contract, mode)
    except ValueError as error:
        raise ValueError(f"{key} (vocabulary={teacher.vocabulary}) does not fit: {error}") from error


def _knows_extended(contract: VocabContract, start: int | None) -> bool | None:
    """Whether a teacher names the ids from ``start`` on as the student does; None: neither all nor none of them."""
    if start is None:
        return None
    if contract.shared_ids == contract.student.ids:
        return True
    lacks_all = contract.derived_start == start and contract.shared_ids + contract.extended_ids == contract.student.ids
    return False if lacks_all else None

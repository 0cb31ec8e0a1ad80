"""The vocabularies of a run's models, held against each other before anything reads the threshold.

In: the configuration. Out: what student and teacher share, and in the place of ``extend_vocab_start_token=auto`` the id
it stands for. How two vocabularies are compared is ``verl.utils.vocab_contract``'s part.
"""

import logging

from verl.config import PPOConfig
from verl.utils.vocab_contract import VocabContract, enforce, read_contract

logger = logging.getLogger(__name__)


def resolve_vocabulary(config: PPOConfig) -> VocabContract | None:
    """Check that the vocabularies fit together, and put the id in the place of ``extend_vocab_start_token=auto``.

    Returns:
        What the two models share; None where there is no teacher of its own, or ``trainer.vocab_check=off``.

    Raises:
        ValueError: a tokenizer is missing, or under ``trainer.vocab_check=strict`` the two do not fit.
    """
    model, teacher = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    rollout, mode = config.actor_rollout_ref.rollout, str(config.trainer.vocab_check)
    if not teacher.path:
        if rollout.extend_vocab_start_token == "auto":
            config.resolve_extend_start(None)  # the student's own starting weights are the reference
        return None
    if mode == "off":
        return None
    contract = read_contract(
        str(model.path),
        teacher.path,
        rollout.extend_vocab_start_token,
        student_tokenizer=model.tokenizer_path,
        teacher_tokenizer=teacher.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )
    enforce(contract, mode)
    config.resolve_extend_start(contract.extend_start)
    asked = config.algorithm.distill.topk_or_none or 0
    if asked > contract.shared_ids:
        raise ValueError(
            f"algorithm.distill.topk={asked} is more than the {contract.shared_ids} ids that student and teacher "
            "share; lower it, or set algorithm.distill.objective=exact for all of them"
        )
    for name, further in config.algorithm.distill.teachers.items():
        if further.path is not None:
            check_further_teacher(config, name)
    return contract


def check_further_teacher(config: PPOConfig, name: str) -> None:
    """Hold a teacher of ``algorithm.distill.teachers`` to what it is said to know.

    Raises:
        ValueError: under ``trainer.vocab_check=strict``, it does not fit the student. Where it only knows more or less
            than it is said to, the first line says what to set.
    """
    teacher, mode = config.algorithm.distill.teachers[name], str(config.trainer.vocab_check)
    start = config.actor_rollout_ref.rollout.extend_start
    contract = _contract_with(config, str(teacher.path), None if teacher.knows_extended else start)
    knows_extended = _knows_extended(contract, start)
    if knows_extended is not None and knows_extended != teacher.knows_extended:
        # What is left is told as it will be once this is set: until then half of the advice would be about it.
        contract = _contract_with(config, str(teacher.path), None if knows_extended else start)
        advice = _vocabulary_to_set(config, name, knows_extended)
        if mode == "strict":
            raise ValueError("\n".join((advice, *(f"- {problem}" for problem in contract.problems))))
        logger.warning(advice)
    try:
        enforce(contract, mode)
    except ValueError as error:
        raise ValueError(
            f"algorithm.distill.teachers.{name} (vocabulary={teacher.vocabulary}) does not fit: {error}"
        ) from error


def _contract_with(config: PPOConfig, teacher: str, start: int | None) -> VocabContract:
    """What the student shares with a further teacher that lacks the ids from ``start`` on; None: it lacks none."""
    model = config.actor_rollout_ref.model
    return read_contract(
        str(model.path),
        teacher,
        start,
        student_tokenizer=model.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )


def _knows_extended(contract: VocabContract, start: int | None) -> bool | None:
    """Whether a teacher names the ids from ``start`` on as the student does; None: neither all nor none of them."""
    if start is None:
        return None
    if contract.shared_ids == contract.student_ids:
        return True
    lacks_all = contract.derived_start == start and contract.shared_ids + contract.extended_ids == contract.student_ids
    return False if lacks_all else None


def _vocabulary_to_set(config: PPOConfig, name: str, knows_extended: bool) -> str:
    key, teacher = f"algorithm.distill.teachers.{name}", config.algorithm.distill.teachers[name]
    why = "knows the item tokens" if knows_extended else "lacks the item tokens"
    return (
        f"set {key}.vocabulary={'full' if knows_extended else 'base'}: {key}.path={teacher.path} {why}, and "
        f"vocabulary={teacher.vocabulary} says otherwise"
    )

"""Checks the vocabularies of a run's models before anything reads the threshold.

In: the configuration. Out: what student and teacher share, and the id in the place of
``extend_vocab_start_token=auto``. How two vocabularies are compared is in ``verl.utils.vocab_contract``.
"""

import logging
from functools import partial

from verl.config import DistillConfig, PPOConfig
from verl.config.ppo import teacher_key
from verl.single_controller.base import WorkerError
from verl.utils.vocab_contract import AUTO, enforce, read_contract
from verl.utils.vocab_rules import VocabContract
from verl.workers.served_teacher import ServedTeacher

logger = logging.getLogger(__name__)


def resolve_vocabulary(config: PPOConfig) -> VocabContract | None:
    """Check that the vocabularies fit together, and put the id in the place of ``extend_vocab_start_token=auto``.

    Returns:
        what the two models share; None where there is no teacher of its own, or ``trainer.vocab_check=off``.

    Raises:
        ValueError: a tokenizer is missing, or under ``trainer.vocab_check=strict`` the two do not fit.
    """
    model, teacher = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    start, distill = config.actor_rollout_ref.rollout.extend_vocab_start_token, config.algorithm.distill
    mode = str(config.trainer.vocab_check)
    if not teacher.path and start == AUTO:
        config.resolve_extend_start(None)  # the student's own starting weights are the reference
    if mode == "off":
        return None
    read = partial(
        read_contract,
        str(model.path),
        student_tokenizer=model.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        overrides=model.override_config,
    )
    contract = None
    if teacher.path:
        contract = read(teacher.path, start, teacher_tokenizer=teacher.tokenizer_path)
        enforce(contract, mode)
        config.resolve_extend_start(contract.extend_start)
        _warn_of_stand_in(config, contract)
        _check_topk(distill, contract)
    begins = config.actor_rollout_ref.rollout.extend_start
    for name, further in distill.teachers.items():
        if further.path is None:
            continue
        # AUTO: where the ids that this teacher lacks begin, to be compared with the run's threshold.
        key, found = f"algorithm.distill.teachers.{name}", read(further.path, AUTO)
        lacks = found.extend_start
        if lacks not in (None, begins):
            fix = "give" if begins else f"set actor_rollout_ref.rollout.extend_vocab_start_token={lacks}, or give"
            found.problems.insert(0, f"{key}.path={further.path} lacks ids from {lacks} on; {fix} another model")
        elif begins is not None and (lacks is None) != further.knows_extended:
            right, verb = ("full", "knows") if lacks is None else ("base", "lacks")
            advice = f"set {key}.vocabulary={right}, not {further.vocabulary}: {further.path} {verb} the item tokens"
            found.problems.insert(0, advice)
        enforce(found, mode, f"student and {key}")
        _check_topk(distill, found)
        if not further.knows_extended:
            _warn_of_stand_in(config, found)
    return contract


def _check_topk(distill: DistillConfig, contract: VocabContract) -> None:
    if (distill.topk_or_none or 0) > len(contract.shared):
        raise ValueError(
            f"algorithm.distill.topk={distill.topk} is more than the {len(contract.shared)} ids that student and "
            "teacher share; lower it, or set algorithm.distill.objective=exact for all of them"
        )


def check_servers(config: PPOConfig) -> None:
    """Check that every server of a teacher scores rows as long as the run's, and makes the student's tokens of a text.

    Raises:
        ValueError: one does not; the tokens only under ``trainer.vocab_check=strict``.
    """
    distill, mode = config.algorithm.distill, str(config.trainer.vocab_check)
    for role in config.served_roles:
        key = f"{teacher_key(role)}.url"
        try:
            server = ServedTeacher(config.actor_rollout_ref, "", distill.teachers.get(role), distill.topk_or_none)
            if role in config.engine_roles:
                continue  # it is not there yet, and its tokenizer was compared
            server.init_model()
            found = server.find_other_tokens() if mode != "off" else []
        except (ValueError, WorkerError) as error:
            raise ValueError(f"{key}: {error}") from error
        if found and mode == "strict":
            fix = "serve the model that the student's vocabulary extends (trainer.vocab_check=warn goes on with it)"
            raise ValueError("\n- ".join((f"{key}: {fix}:", *found)))
        if found:
            logger.warning("trainer.vocab_check=%s lets servers with other tokens pass: %s", mode, found)


def _warn_of_stand_in(config: PPOConfig, contract: VocabContract) -> None:
    """Warn where a pad token that ends texts replaces ids the teacher lacks, and the teacher reads on after it."""
    teacher, models = contract.teacher, config.actor_rollout_ref
    reads_on = config.data.prompt_extend_tokens == "replace" or not models.rollout.mask_after_extend_token
    pad = teacher.tokenizer.pad_token_id
    if contract.extended and reads_on and models.ref.ref_replace_token_id is None and pad in teacher.end_ids:
        plain = teacher.name(teacher.tokenizer.encode("...", add_special_tokens=False)[0])
        logger.warning(
            f"in place of ids that it lacks {teacher.model} reads {teacher.name(pad)}, which ends a text; set "
            f"actor_rollout_ref.ref.ref_replace_token_id to one that does not, such as {plain}"
        )

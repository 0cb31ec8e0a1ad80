"""Whether a checkpoint belongs to the run that wants to go on from it.

In: a checkpoint, and this run's settings and facts. Out: nothing, where both train the same thing; a warning that
lists what differs and may; a ValueError that lists what differs and may not.

Facts say what settings cannot: a model, a teacher and data are the same wherever they lie, so the path of one counts
only where no facts stand for it. Settings fall into three kinds, by the longest key of ``SETTINGS`` that covers them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.trainer.checkpoint.layout import checkpoint_step, clear_leftovers, find_checkpoint
from verl.trainer.checkpoint.manifest import read_manifest
from verl.utils.dataset.parquet_files import expand_data_files, file_digest
from verl.utils.model_identity import model_facts
from verl.utils.saved_config import public_dict

logger = logging.getLogger(__name__)


class Kind(Enum):
    """What becomes of a setting that differs."""

    FIXED = "the run is refused"
    SAID = "the run goes on and says so"
    FREE = "nothing: it does not change what is trained, or a fact stands for it"


_ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{role}" for role in ("actor", "ref", "rollout"))

SETTINGS: dict[str, Kind] = {
    "algorithm": Kind.FIXED,
    "actor_rollout_ref": Kind.SAID,
    "actor_rollout_ref.model.path": Kind.FREE,
    "actor_rollout_ref.model.tokenizer_path": Kind.FREE,
    "actor_rollout_ref.model.override_config": Kind.FIXED,
    f"{_ACTOR}.checkpoint": Kind.FREE,
    **{
        f"{_ACTOR}.{name}": Kind.FIXED
        for name in (
            "ppo_mini_batch_size",
            "ppo_epochs",
            "clip_ratio",
            "clip_ratio_low",
            "clip_ratio_high",
            "clip_ratio_c",
            "loss_agg_mode",
            "entropy_coeff",
            "use_kl_loss",
            "kl_loss_coef",
            "kl_loss_type",
            "grad_clip",
            "ref_log_prob_replace_val",
            "freeze_extended_rows",
            "optim",
        )
    },
    f"{_ACTOR}.optim.lr": Kind.SAID,
    f"{_ACTOR}.optim.total_training_steps": Kind.SAID,
    f"{_REF}.model": Kind.FREE,
    f"{_REF}.ref_log_prob_replace_val": Kind.FIXED,
    f"{_REF}.ref_replace_token_id": Kind.FIXED,
    **{
        f"{_ROLLOUT}.{name}": Kind.FIXED
        for name in (
            "n",
            "temperature",
            "top_p",
            "top_k",
            "ignore_eos",
            "extend_vocab_start_token",
            "mask_response_if_have_extend_token",
            "mask_after_extend_token",
            "multi_turn",
            "agent.default_agent_loop",
        )
    },
    f"{_ROLLOUT}.multi_turn.tool_config_path": Kind.SAID,
    f"{_ROLLOUT}.multi_turn.tool_timeout_s": Kind.SAID,
    f"{_ROLLOUT}.prompt_length": Kind.FREE,  # follow data.max_*_length
    f"{_ROLLOUT}.response_length": Kind.FREE,
    f"{_ROLLOUT}.val_kwargs": Kind.FREE,
    f"{_ROLLOUT}.timeout_s": Kind.FREE,
    "data": Kind.FIXED,
    "data.train_files": Kind.FREE,
    "data.synthetic_item_prompts.catalogue": Kind.FREE,
    "data.val_files": Kind.FREE,
    "data.val_batch_size": Kind.FREE,
    "data.val_max_samples": Kind.FREE,
    "data.cache_dir": Kind.FREE,
    "data.custom_cls.path": Kind.SAID,
    "data.max_dropped_fraction": Kind.FREE,
    "data.on_bad_row": Kind.FREE,
    "custom_reward_function": Kind.FIXED,
    "custom_reward_function.path": Kind.SAID,
    "trainer": Kind.FREE,
    "ray_kwargs": Kind.FREE,
}
"""A key or section, and what becomes of a run that resumes with another value."""
WHOLE = (
    "actor_rollout_ref.model.override_config",
    f"{_ROLLOUT}.engine_kwargs",
    "data.apply_chat_template_kwargs",
    "data.source_weights",
    "data.synthetic_item_prompts.templates",
)
"""Maps of the user's own keys, which differ as a whole: one that is new or gone is a difference too."""
TEACHERS = "algorithm.distill.teachers"
"""A map of the user's own names: which there are, and their order, is a difference, and so is every field of each."""
VALIDATION = ("data.val_files", "data.val_max_samples", f"{_ROLLOUT}.val_kwargs")
"""What validations measure. Fixed where both runs judge their steps by ``trainer.best_metric``: the best so far and
bounds "of step 0" were measured so, and the model of step 0 is not there to be measured again."""


class Difference(NamedTuple):
    """A setting or a fact that is not as it was."""

    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.there)} in the checkpoint, {_short(self.here)} now"


def run_facts(config: PPOConfig, vocab_fingerprint: str | None = None) -> dict[str, Any]:
    """What a run trains, learns from and reads, by name.

    Args:
        vocab_fingerprint: of the vocabularies that student and teacher share; None: not compared.
    """
    models = config.actor_rollout_ref
    facts = {f"student.{name}": value for name, value in _facts_of(models.model).items()}
    facts |= {f"teacher.{name}": value for name, value in _facts_of(models.ref.model).items()}
    for role, teacher in config.algorithm.distill.teachers.items():
        if teacher.path:  # else the student, of which there are facts
            facts |= {f"teachers.{role}.{name}": value for name, value in model_facts(teacher.path, None).items()}
    if not config.data.custom_cls.path:  # a class of the user's own reads what it likes
        for key, named in (("data.train_files", config.data.train_files), ("data.val_files", config.data.val_files)):
            if named:
                facts[key] = _file_facts(expand_data_files(named))
    synthetic = config.data.synthetic_item_prompts
    if synthetic.count:
        files = [] if synthetic.catalogue is None else expand_data_files(synthetic.catalogue)
        facts["data.synthetic_item_prompts.catalogue"] = [file_digest(path) for path in files]
    if vocab_fingerprint is not None:
        facts["vocabulary"] = vocab_fingerprint
    return facts


def require_resumable(config: PPOConfig, facts: Mapping[str, Any], total_steps: int) -> None:
    """Look at the checkpoint that the run will resume from, if there is one, before anything starts.

    What a killed run left half-written is dealt with first.

    Raises:
        ValueError: it is not whole, belongs to a run that trains otherwise, or leaves this run no step to take.
    """
    trainer = config.trainer
    if not trainer.val_only:  # validating a run that is still going must not touch what it writes
        try:
            clear_leftovers(trainer.default_local_dir)
        except OSError as error:
            raise ValueError(
                f"trainer.default_local_dir={trainer.default_local_dir} cannot be written: {error}; name a folder "
                "that you may write"
            ) from error
    folder = find_checkpoint(trainer)
    if folder is None:
        return
    require_same_run(folder, config, facts)
    if not trainer.val_only and checkpoint_step(folder) >= total_steps:
        raise ValueError(
            f"nothing to train: {folder} is at step {checkpoint_step(folder)} and the run ends at step {total_steps}; "
            "raise trainer.total_training_steps, or start afresh with trainer.resume_mode=disable or another "
            "trainer.default_local_dir (OUTPUT_DIR)"
        )


def require_same_run(folder: Path, config: PPOConfig, facts: Mapping[str, Any]) -> None:
    """Hold the run to what a checkpoint was trained with, and say what differs and may.

    Raises:
        ValueError: the checkpoint was trained with something that this run has otherwise; the message lists it.
    """
    manifest = read_manifest(folder)
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    there, here = _flat(saved), _flat(_plain(public_dict(config)))
    facts = _plain(dict(facts))
    by_fact = {key for key in here if _has_facts(key, manifest.facts) and _has_facts(key, facts)}
    changed = [found for found in _compare(there, here) if found.key not in by_fact]
    is_judged = bool(there.get("trainer.best_metric") and here["trainer.best_metric"]) and not config.trainer.val_only

    def kind(key: str) -> Kind:
        if not covers(VALIDATION, key):
            return kind_of(key)
        if not is_judged:
            return Kind.FREE
        return Kind.SAID if key in facts and key not in manifest.facts else Kind.FIXED  # older ones have paths alone

    other_facts = [found for found in _compare(manifest.facts, facts) if is_judged or not covers(VALIDATION, found.key)]
    fixed = [*other_facts, *(found for found in changed if kind(found.key) is Kind.FIXED)]
    allowed = config.trainer.resume_allow_changed
    refused = [found for found in fixed if not covers(allowed, found.key)]
    if refused:
        raise ValueError(
            f"{folder} was trained otherwise than this run would go on:\n"
            + "\n".join(f"- {found}" for found in refused)
            + "\nset them as they were, or start afresh (trainer.resume_mode=disable, or another "
            "trainer.default_local_dir), or allow what you mean to change: "
            f"trainer.resume_allow_changed=[{','.join(found.key for found in refused)}]"
        )
    said = [found for found in changed if kind(found.key) is Kind.SAID]
    for found in [*fixed, *said]:
        logger.warning("resuming with another setting: %s", found)
    if manifest.world_size != config.trainer.world_size:
        logger.warning("resuming on %d ranks what %d wrote", config.trainer.world_size, manifest.world_size)


def kind_of(key: str) -> Kind:
    """The kind of a setting; what no entry of ``SETTINGS`` covers is said."""
    covering = [entry for entry in SETTINGS if covers([entry], key)]
    return SETTINGS[max(covering, key=len)] if covering else Kind.SAID


def covers(entries: Sequence[str], key: str) -> bool:
    """Whether one of the entries is the key itself or a section above it."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in entries)


def _facts_of(model: Any) -> dict[str, Any]:
    return model_facts(model.path, model.tokenizer_path)


def _file_facts(files: Sequence[Path]) -> dict[str, int] | list[list[Any]]:
    """Sizes by name; of files that share a name, which are kept apart by their folders, pairs in their order."""
    sizes = [(path.name, path.stat().st_size) for path in files]
    return dict(sizes) if len(dict(sizes)) == len(sizes) else [list(pair) for pair in sizes]


def _compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """Of what both have: a key that only one of two versions of this program knows says nothing."""
    return [Difference(key, there[key], here[key]) for key in there if key in here and not _same(there[key], here[key])]


def _same(there: Any, here: Any) -> bool:
    """Equal; maps in their order too, for the first teacher or pattern that matches counts."""
    return there == here and (not isinstance(there, Mapping) or list(there) == list(here))


def _has_facts(key: str, facts: Mapping[str, Any]) -> bool:
    """Whether facts say more than a setting, because it is the path of what they are about."""
    if key.startswith(f"{TEACHERS}.") and key.endswith(".path"):
        role = key.removeprefix(f"{TEACHERS}.").removesuffix(".path")
        return any(name.startswith(f"teachers.{role}.") for name in facts)
    return key == "data.val_files" and key in facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == TEACHERS:
            flat |= {key: list(value), **_flat(value, f"{key}.")}
        elif isinstance(value, Mapping) and value and key not in WHOLE:
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _plain(values: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(values))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."

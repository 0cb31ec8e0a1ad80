"""Whether a checkpoint belongs to the run that wants to continue from it.

In: this run's settings and identity, and the checkpoint that ``trainer.resume_mode`` names. Out: the checkpoint; a
warning for each difference that may be; a ValueError that lists those that may not. All before anything starts.

A run's identity describes its models and data wherever they lie. So a path is compared only where the identity does not
cover it. What becomes of a difference is decided by the longest entry of
``RULES`` that matches its key.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.trainer.checkpoint import layout
from verl.utils.dataset.parquet_files import expand_data_files, file_digest
from verl.utils.saved_config import public_dict
from verl.utils.tokenizer import local_model_folder

logger = logging.getLogger(__name__)

START_AFRESH = "trainer.resume_mode=disable or another default_local_dir starts afresh"
"""How not to continue from a checkpoint, for messages."""


Rule = Enum("Rule", "REFUSE WARN IGNORE")
"""What becomes of a run that differs from its checkpoint."""


def _rules(rule: Rule, section: str, names: str) -> dict[str, Rule]:
    """One rule for several keys of a section."""
    return {f"{section}.{name}".lstrip("."): rule for name in names.split()}


_MODEL, _ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("model", "actor", "ref", "rollout"))
RULES = {
    **_rules(Rule.REFUSE, "", "student teacher teachers vocabulary"),  # of the identity
    **_rules(Rule.REFUSE, "", "algorithm data custom_reward_function"),
    **_rules(Rule.WARN, "", "actor_rollout_ref data.custom_cls.path custom_reward_function.path"),
    **_rules(Rule.IGNORE, "", "trainer ray_kwargs"),
    **_rules(Rule.REFUSE, _MODEL, "override_config"),
    **_rules(Rule.IGNORE, _MODEL, "path tokenizer_path"),
    **_rules(Rule.REFUSE, _ACTOR, "ppo_mini_batch_size ppo_epochs clip_ratio clip_ratio_low clip_ratio_high"),
    **_rules(Rule.REFUSE, _ACTOR, "clip_ratio_c loss_agg_mode entropy_coeff use_kl_loss kl_loss_coef kl_loss_type"),
    **_rules(Rule.REFUSE, _ACTOR, "grad_clip ref_log_prob_replace_val freeze_extended_rows optim"),
    **_rules(Rule.WARN, _ACTOR, "optim.lr optim.total_training_steps"),
    **_rules(Rule.IGNORE, _ACTOR, "checkpoint"),
    **_rules(Rule.REFUSE, _REF, "ref_log_prob_replace_val ref_replace_token_id"),
    **_rules(Rule.IGNORE, _REF, "model"),
    **_rules(Rule.REFUSE, _ROLLOUT, "n temperature top_p top_k ignore_eos extend_vocab_start_token multi_turn"),
    **_rules(Rule.REFUSE, _ROLLOUT, "mask_response_if_have_extend_token mask_after_extend_token"),
    **_rules(Rule.REFUSE, _ROLLOUT, "agent.default_agent_loop"),
    **_rules(Rule.WARN, _ROLLOUT, "multi_turn.tool_config_path multi_turn.tool_timeout_s"),
    **_rules(Rule.IGNORE, _ROLLOUT, "prompt_length response_length timeout_s"),  # lengths follow data.*
    **_rules(Rule.IGNORE, "data", "val_batch_size cache_dir max_dropped_fraction on_bad_row"),
}
"""By key or section; a key that no entry matches is warned of."""
WHOLE_MAPS = (
    f"{_MODEL}.override_config",
    f"{_ROLLOUT}.engine_kwargs",
    "data.apply_chat_template_kwargs",
    "data.source_weights",
    "data.synthetic_item_prompts.templates",
)
"""Maps of the user's own keys, compared as a whole: a key that is new or gone is a difference too."""
TEACHERS = "algorithm.distill.teachers"
"""A map of the user's own names: the list of names is compared, and every field of each teacher."""
VALIDATION = ("data.val_files", "data.val_max_samples", f"{_ROLLOUT}.val_kwargs")
"""What validations measure: refused where both runs have a ``trainer.best_metric``, for the best so far and bounds "of
step 0" were measured so, and the model of step 0 is not there to be measured again; else ignored."""

VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Entries of a model's config.json that another save of the same model may change."""
SAMPLES, SAMPLE_BYTES, DIGEST_DIGITS = 32, 4096, 16
SHOWN_CHARACTERS = 100


# ------------------------------------------------------------------ what a run is


def run_identity(config: PPOConfig, vocab_fingerprint: str | None = None) -> dict[str, Any]:
    """Models, vocabulary and data of a run, by name.

    Args:
        vocab_fingerprint: of the ids that student and teacher share; None: not compared.
    """
    student, base, data = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model, config.data
    models = {"student": model_identity(student.path, student.tokenizer_path)}
    models["teacher"] = model_identity(base.path, base.tokenizer_path)
    for role, teacher in config.algorithm.distill.teachers.items():
        models[f"teachers.{role}"] = model_identity(teacher.path)
    identity = {f"{model}.{name}": value for model, entries in models.items() for name, value in entries.items()}
    if not data.custom_cls.path:  # a class of the user's own reads what it likes
        for key, named in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
            if named:
                sizes = [(path.name, path.stat().st_size) for path in expand_data_files(named)]
                # Files of one name in several folders are told apart by their order.
                identity[key] = dict(sizes) if len(dict(sizes)) == len(sizes) else sizes
    if data.synthetic_item_prompts.count:
        catalogue = data.synthetic_item_prompts.catalogue
        files = [] if catalogue is None else expand_data_files(catalogue)
        identity["data.synthetic_item_prompts.catalogue"] = [file_digest(path) for path in files]
    if vocab_fingerprint is not None:
        identity["vocabulary"] = vocab_fingerprint
    return identity


def model_identity(model: str | None, tokenizer: str | None = None) -> dict[str, Any]:
    """Entries of a model's config.json, and digests of its tokenizer and of samples of its weights.

    A folder that was moved or copied has the same identity. Empty where there is no model or it is not on this machine.
    """
    folder = local_model_folder(model)
    if folder is None:
        return {}
    identity: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        identity |= {f"config.{name}": value for name, value in entries.items() if name not in VOLATILE}
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if weights:
        identity["weights"] = _digest_of_samples(weights)
    words = (local_model_folder(tokenizer) or folder) / "tokenizer.json"
    if words.is_file():
        identity["tokenizer"] = file_digest(words)[:DIGEST_DIGITS]
    return identity


def _digest_of_samples(files: Iterable[Path]) -> str:
    """Digest of the files' sizes and of pieces spread evenly over each: other weights differ nearly everywhere."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as stream:
            for number in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:DIGEST_DIGITS]


# ------------------------------------------------------------------ finding and loading


def find_resumable(config: PPOConfig, identity: dict[str, Any], total_steps: int) -> Path | None:
    """The checkpoint that the run will continue from; None: it starts afresh.

    First clears what a killed run left half-written.

    Raises:
        ValueError: the checkpoint is not whole, belongs to another run, or leaves this run no step to take.
    """
    trainer = config.trainer
    if not trainer.val_only:  # validating a run that is still going must not touch what it writes
        try:
            layout.clear_leftovers(trainer.default_local_dir)
        except OSError as error:
            raise ValueError(
                f"trainer.default_local_dir={trainer.default_local_dir} cannot be written: {error}; name a folder "
                "that you may write"
            ) from error
    folder = layout.find_checkpoint(trainer)
    if folder is None:
        return None
    require_same_run(folder, config, identity)
    step = layout.checkpoint_step(folder)
    if not trainer.val_only and step >= total_steps:
        raise ValueError(
            f"nothing to train: {folder} is at step {step} and the run ends at step {total_steps}; raise "
            "trainer.total_training_steps, or start afresh with trainer.resume_mode=disable or another "
            "trainer.default_local_dir (OUTPUT_DIR)"
        )
    return folder


def load_driver_state(folder: Path) -> dict[str, Any]:
    """What the trainer kept in a checkpoint: position in the data, KL weight, teacher probe, metrics of the step."""
    state = torch.load(folder / layout.DRIVER_STATE, weights_only=True)
    for before, name in (("canary", "teacher_probe"), ("figures", "metrics")):
        if before in state:
            state[name] = state.pop(before)
    return state


# ------------------------------------------------------------------ comparing


def require_same_run(folder: Path, config: PPOConfig, identity: dict[str, Any]) -> None:
    """Compare the run with the one that wrote a checkpoint; warn of differences that may be.

    Raises:
        ValueError: there are differences that may not be; the message lists them.
    """
    manifest, allowed = layout.read_manifest(folder), config.trainer.resume_allow_changed
    saved = _flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    now, identity = _flatten(_as_json(public_dict(config))), _as_json(identity)
    both_have_rule = (
        bool(saved.get("trainer.best_metric") and now["trainer.best_metric"]) and not config.trainer.val_only
    )
    in_both = manifest.identity.keys() & identity.keys()
    there, here = (
        {key: value for key, value in settings.items() if not _is_covered(key, in_both)} | entries
        for settings, entries in ((saved, manifest.identity), (now, identity))
    )
    changed, texts = {}, {}
    for key, old in there.items():
        # A key that one of two versions of this program lacks is no difference.
        rule, new = rule_of(key, both_have_rule), here.get(key, old)
        # Maps differ by their order too: the first teacher or pattern that matches a source counts.
        is_same = old == new and (not isinstance(old, Mapping) or list(old) == list(new))
        if not is_same and rule is not Rule.IGNORE:
            changed[key] = rule
            was, is_now = (json.dumps(value, ensure_ascii=False)[:SHOWN_CHARACTERS] for value in (old, new))
            texts[key] = f"{key}: {was} in the checkpoint, {is_now} now"
    refused = [key for key, rule in changed.items() if rule is Rule.REFUSE and not matches(allowed, key)]
    if refused:
        raise ValueError(
            f"{folder} was trained otherwise than this run would go on:\n"
            + "\n".join(f"- {texts[key]}" for key in refused)
            + "\nset them as they were, or start afresh (trainer.resume_mode=disable, or another "
            "trainer.default_local_dir), or allow what you mean to change: "
            f"trainer.resume_allow_changed=[{','.join(refused)}]"
        )
    for text in texts.values():
        logger.warning("resuming with another setting: %s", text)
    if manifest.world_size != config.trainer.world_size:
        logger.warning("resuming on %d ranks what %d wrote", config.trainer.world_size, manifest.world_size)


def rule_of(key: str, both_have_rule: bool = False) -> Rule:
    """The rule of a setting or an entry of the identity.

    Args:
        both_have_rule: both runs have a ``trainer.best_metric``.
    """
    if matches(VALIDATION, key):
        return Rule.REFUSE if both_have_rule else Rule.IGNORE
    matching = [entry for entry in RULES if matches([entry], key)]
    return RULES[max(matching, key=len)] if matching else Rule.WARN


def matches(entries: Sequence[str], key: str) -> bool:
    """Whether one of the entries is the key itself or a section above it."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in entries)


def _is_covered(key: str, identity: Collection[str]) -> bool:
    """Whether a setting is a path, and the identity describes what lies there."""
    if key.startswith(f"{TEACHERS}.") and key.endswith(".path"):
        role = key.removeprefix(f"{TEACHERS}.").removesuffix(".path")
        return any(name.startswith(f"teachers.{role}.") for name in identity)
    # A class of the user's own reads what it likes from data.train_files.
    return key in (*identity, "data.train_files", "data.synthetic_item_prompts.catalogue")


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their full keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == TEACHERS:
            flat |= {key: list(value), **_flatten(value, f"{key}.")}
        elif isinstance(value, Mapping) and value and key not in WHOLE_MAPS:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _as_json(values: Any) -> Any:
    """Values as they come back from a file: tuples are lists."""
    return json.loads(json.dumps(values))

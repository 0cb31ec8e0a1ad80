"""Whether a checkpoint belongs to the run that wants to continue from it.

In: this run's settings and identity, and the checkpoint that ``trainer.resume_mode`` names. Out: the checkpoint; a
warning for each difference that may be; a ValueError that lists those that may not. All before anything starts.

A run's identity describes its models and data wherever they lie. So a path is compared only where the identity does not
cover it. ``resume_rules.yaml`` decides what becomes of a difference.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.config.ppo import teacher_key
from verl.trainer.checkpoint import layout
from verl.utils.broken_files import read_json
from verl.utils.dataset.parquet_files import expand_data_files, file_digest, text_digest
from verl.utils.durable_files import hold_folder
from verl.utils.redaction import public_dict
from verl.utils.tokenizer import local_model_folder

logger = logging.getLogger(__name__)

TABLE: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("resume_rules.yaml")))
RULES = {key: rule for rule in ("refuse", "warn", "ignore") for key in TABLE[rule]}
"""What becomes of a difference, by key or section."""
TEACHERS = "algorithm.distill.teachers"
"""A map of the user's own names: the list of names is compared, and every field of each teacher."""
SERVERS = ("url", "api_key_env", "engine", "engine_kwargs")
"""Fields of a teacher that say where it is."""
CATALOGUE = "data.synthetic_item_prompts.catalogue"
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Entries of a model's config.json that another save of the same model may change."""
SAMPLES, SAMPLE_BYTES, DIGEST_DIGITS, SHOWN_CHARACTERS = 32, 4096, 16, 100


# ------------------------------------------------------------------ what a run is


def run_identity(config: PPOConfig, vocab_fingerprint: str | None = None) -> dict[str, Any]:
    """Models, vocabulary and data of a run, by name.

    Args:
        vocab_fingerprint: of the ids that student and teacher share; None: not compared.
    """
    student, base, data = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model, config.data
    models = {"student": (student.path, student.tokenizer_path), "teacher": (base.path, base.tokenizer_path)}
    models |= {f"teachers.{role}": (teacher.path, None) for role, teacher in config.algorithm.distill.teachers.items()}
    identity = {
        f"{model}.{name}": value for model, paths in models.items() for name, value in model_identity(*paths).items()
    }
    for key, files in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        if files and not data.custom_cls.path:  # a class of the user's own reads what it likes
            identity[key] = [[path.name, path.stat().st_size] for path in expand_data_files(files)]
    catalogues = {f"{teacher_key(role)}.item_text.content": each.item_text for role, each in config.teachers.items()}
    if data.synthetic_item_prompts.count:
        catalogues[CATALOGUE] = data.synthetic_item_prompts.catalogue or ""
    for key, catalogue in catalogues.items():
        if catalogue is not None:
            identity[key] = [file_digest(path) for path in expand_data_files(catalogue)] if catalogue else []
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
    fix = "copy the model again"
    entries = read_json(folder / "config.json", fix)  # none beside the tokenizer of a served teacher
    identity = {f"config.{name}": value for name, value in entries.items() if name not in VOLATILE}
    identity["weights"] = _digest_of_samples(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))
    words = local_model_folder(tokenizer) or folder
    if (words / "tokenizer.json").is_file():
        identity["tokenizer"] = file_digest(words / "tokenizer.json")[:DIGEST_DIGITS]
    # As transformers looks for it; a text that is empty where there is none, so that a new one is a difference.
    template, settings = words / "chat_template.jinja", read_json(words / "tokenizer_config.json", fix)
    text = template.read_text(encoding="utf-8") if template.is_file() else json.dumps(settings.get("chat_template"))
    identity["chat_template"] = text_digest(text)[:DIGEST_DIGITS]
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

    First takes the run's folder for this process, and clears what a killed run left half-written there.

    Raises:
        layout.NothingToTrain: the checkpoint leaves this run no step to take.
        ValueError: another process trains in the folder; what a killed run left cannot be removed; the checkpoint is
            not whole, or belongs to another run.
    """
    trainer = config.trainer
    if not (trainer.val_only or trainer.check_only):  # what a run that is still going writes must not be touched
        try:
            if not hold_folder(trainer.default_local_dir):
                what = (
                    f"trainer.default_local_dir={trainer.default_local_dir} is the folder of a run that still goes on"
                )
                raise ValueError(f"{what}; wait for its end, or give this one a folder of its own")
            layout.clear_leftovers(trainer.default_local_dir)
        except OSError as error:
            raise ValueError(
                f"trainer.default_local_dir={trainer.default_local_dir} holds what a killed run left, and it cannot be "
                f"removed: {error}"
            ) from error
    folder = layout.find_checkpoint(trainer)
    if folder is None:
        return None
    require_same_run(folder, config, identity)
    if not trainer.val_only and layout.checkpoint_step(folder) >= total_steps:
        raise layout.NothingToTrain(
            f"nothing to train: the run ends at step {total_steps} and {folder} is there; raise "
            "trainer.total_training_steps, or set trainer.resume_mode=disable or another trainer.default_local_dir"
        )
    return folder


def load_driver_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What the trainer kept in a checkpoint: position in the data, KL weight, teacher probe, metrics of the step.

    ``other_files`` says whether its training data were other files than those of this run's identity.
    """
    state, files = torch.load(folder / layout.DRIVER_STATE, weights_only=True), "data.train_files"
    return state | {"other_files": layout.read_manifest(folder)["identity"].get(files) != identity.get(files)}


# ------------------------------------------------------------------ comparing


def require_same_run(folder: Path, config: PPOConfig, identity: dict[str, Any]) -> None:
    """Compare the run with the one that wrote a checkpoint; warn of differences that may be.

    Raises:
        ValueError: there are differences that may not be; the message lists them.
    """
    described, trainer = layout.read_manifest(folder)["identity"], config.trainer
    saved = _flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    rules = [saved.get(f"trainer.{name}") and getattr(trainer, name) for name in ("best_metric", "keep")]
    both_have_rule = any(rules) and not trainer.val_only
    in_both = described.keys() & identity.keys()
    paths = {f"{TEACHERS}.{name.split('.')[1]}.path" for name in in_both if name.startswith("teachers.")}
    # Servers may move; what they score is compared by the teacher's probe.
    places = {f"{TEACHERS}.{name}.{field}" for name in config.algorithm.distill.teachers for field in SERVERS}
    covered = {CATALOGUE, *paths, *places, *(key.removesuffix(".content") for key in in_both)}
    there, here = (
        {key: value for key, value in settings.items() if not matches(covered, key)} | entries
        for settings, entries in ((saved, described), (_flatten(public_dict(config)), identity))
    )
    refused: dict[str, str] = {}
    for key, old in there.items():
        # A key that one of two versions of this program lacks is no difference. As texts, maps differ by their order
        # too: the first teacher or pattern that matches a source counts.
        was, is_now = (json.dumps(value, ensure_ascii=False) for value in (old, here.get(key, old)))
        rule = rule_of(key, both_have_rule)
        if was == is_now or rule == "ignore":
            continue
        text = f"{key}: {was[:SHOWN_CHARACTERS]} in the checkpoint, {is_now[:SHOWN_CHARACTERS]} now"
        if rule == "refuse" and not matches(trainer.resume_allow_changed, key):
            refused[key] = text
        else:
            logger.warning("resuming with another setting: %s", text)
    if refused:
        raise ValueError(
            f"{folder} was trained with other settings than this run has:\n- " + "\n- ".join(refused.values()) + "\n"
            f"set them as they were, or trainer.resume_allow_changed=[{','.join(refused)}] to change them, or "
            "trainer.resume_mode=disable to start afresh"
        )


def rule_of(key: str, both_have_rule: bool = False) -> str:
    """``refuse``, ``warn`` or ``ignore``: what becomes of another value of a setting or an entry of the identity.

    Args:
        both_have_rule: both runs have a ``trainer.best_metric``, or both a ``trainer.keep``.
    """
    if matches(TABLE["validation"], key):
        return "refuse" if both_have_rule else "ignore"
    matching = [entry for entry in RULES if matches([entry], key)]
    # The longest entry decides, so that one key can be let off in a section that is refused.
    return RULES[max(matching, key=len)] if matching else "warn"


def matches(entries: Iterable[str], key: str) -> bool:
    """Whether one of the entries is the key itself or a section above it."""
    # The dots keep clip_ratio from matching clip_ratio_low.
    return any(f"{key}.".startswith(f"{entry}.") for entry in entries)


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their full keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == TEACHERS:
            flat |= {key: list(value), **_flatten(value, f"{key}.")}
        elif isinstance(value, Mapping) and value and key not in TABLE["whole_maps"]:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat

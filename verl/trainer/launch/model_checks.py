"""What can be wrong with the models of a run, as far as their config.json tells.

In: a ``PPOConfig``. Out: errors and notices. Loads no model and no tokenizer, fetches nothing; whether vocabularies fit
together is left to ``verl.utils.vocab_contract``.
"""

import json
from pathlib import Path
from typing import Any

from verl.config.findings import Findings
from verl.config.ppo import PPOConfig
from verl.utils.hub_cache import local_model_folder


def check_models(config: PPOConfig, found: Findings) -> None:
    """Look for every model, and hold what its config.json says to what the run asks."""
    student_key, teacher_key = "actor_rollout_ref.model", "actor_rollout_ref.ref.model"
    models = config.actor_rollout_ref
    if not models.model.path:
        found.errors.append(f"{student_key}.path is not set; give the student's folder or hub name")
    student = _read_model_config(f"{student_key}.path", models.model.path, found)
    teacher = _read_model_config(f"{teacher_key}.path", models.ref.model.path, found)
    for name, further in config.algorithm.distill.teachers.items():
        key = f"algorithm.distill.teachers.{name}.path"
        described = _read_model_config(key, further.path, found)
        if described is not None:
            _check_length_fits(f"{key}={further.path}", described, config, found)
    for key, path in ((student_key, models.model.tokenizer_path), (teacher_key, models.ref.model.tokenizer_path)):
        _find_model_folder(f"{key}.tokenizer_path", path, found)
    if student is not None:
        student = {**student, **models.model.override_config}
        _check_length_fits(f"{student_key}.path={models.model.path}", student, config, found)
    if teacher is not None:
        _check_length_fits(f"{teacher_key}.path={models.ref.model.path}", teacher, config, found)
    _check_replacement(config, teacher, found)


def _find_model_folder(key: str, path: str | None, found: Findings) -> Path | None:
    """The local folder of a model, or None where it is not set, wrong (an error was noted) or still on the hub."""
    from huggingface_hub import constants

    folder = local_model_folder(path)
    if not path or folder is not None:
        return folder
    if Path(path).expanduser().exists():
        found.errors.append(f"{key}={path} is a file; give the folder it lies in")
    elif not _is_hub_name(path):
        found.errors.append(f"{key}={path}: there is no such folder; correct the path, or give a hub name (owner/name)")
    elif constants.HF_HUB_OFFLINE:
        found.errors.append(
            f"{key}={path} is neither a folder nor in the local hub cache, and HF_HUB_OFFLINE forbids to fetch it; "
            "correct the path, or unset HF_HUB_OFFLINE"
        )
    else:
        found.notices.append(f"{key}={path} is no local folder; it will be fetched from the hub")
    return None


def _is_hub_name(path: str) -> bool:
    """Whether a path that does not exist can be meant as ``owner/name`` rather than as a folder, misspelt."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if path.count("/") != 1 or path[0] in "./~" or Path(path.split("/")[0]).is_dir():
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _read_model_config(key: str, path: str | None, found: Findings) -> dict[str, Any] | None:
    folder = _find_model_folder(key, path, found)
    if folder is None:
        return None
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.errors.append(f"{key}={path} holds no config.json; give a model folder in Hugging Face format")
    except json.JSONDecodeError as error:
        found.errors.append(f"{key}={path}: config.json is no JSON ({error}); copy the model again")
    return None


def _check_length_fits(model: str, model_config: dict[str, Any], config: PPOConfig, found: Findings) -> None:
    if "max_position_embeddings" not in model_config or _scales_positions(model_config):
        return
    limit, rollout = model_config["max_position_embeddings"], config.actor_rollout_ref.rollout
    longest = rollout.prompt_length + rollout.response_length
    if longest > limit:
        found.errors.append(
            f"data.max_prompt_length={rollout.prompt_length} + data.max_response_length={rollout.response_length} = "
            f"{longest} is above max_position_embeddings={limit} of {model}; shorten one of them"
        )


def _scales_positions(model_config: dict[str, Any]) -> bool:
    """Whether the model stretches its rotary embedding beyond ``max_position_embeddings``."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = model_config.get(name)
        if isinstance(rope, dict) and "rope_type" in rope and rope["rope_type"] != "default":
            return True
    return False


def _check_replacement(config: PPOConfig, teacher: dict[str, Any] | None, found: Findings) -> None:
    models = config.actor_rollout_ref
    replacement = models.ref.ref_replace_token_id
    rows = teacher["vocab_size"] if teacher and "vocab_size" in teacher else None
    if rows is not None and replacement is not None and not 0 <= replacement < rows:
        found.errors.append(
            f"actor_rollout_ref.ref.ref_replace_token_id={replacement} is no id of "
            f"actor_rollout_ref.ref.model.path={models.ref.model.path} with vocab_size={rows}; "
            "give one below it, or null for the pad id"
        )

"""What can be wrong with a run outside its configuration, found before anything heavy starts.

In: a ``PPOConfig``, whose sections have checked themselves. Out: errors, all at once, or notices. Looks at folders,
JSON and parquet headers, and installed packages. Loads no model, no tokenizer and no row; starts nothing. Not here:
whether the vocabularies of student and teacher fit together (``vocabulary_check``), what this machine has
(``machine``), and files that are loaded before Ray starts and name their key then: rewards, tools, checkpoints.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl.config.best_rule import BestRule
from verl.config.ppo import PPOConfig
from verl.config.rollout import AGENT_LOOPS
from verl.utils.tokenizer import local_model_folder

GROUP_BASELINES = ("grpo", "rloo")
"""Estimators whose baseline is the other answers to a prompt."""
USUAL_ADV_BOUNDS = {"distill_adv_max_clip": 5.0, "distill_adv_min_clip": -30.0}
"""Those of the recipe's YAML, which a run has without asking for them."""


def check_run(config: PPOConfig) -> list[str]:
    """Look for user errors.

    Returns:
        Notices, a line each, for the caller to log.

    Raises:
        ValueError: what has to change before the run can start, a line each with key, value and fix.
    """
    errors = [
        *_model_errors(config),
        *_algorithm_errors(config),
        *_data_errors(config),
        *_engine_errors(config),
        *_output_errors(config),
    ]
    if errors:
        raise ValueError("\n".join(errors))
    return [*_hub_notices(config), *_algorithm_notices(config), *_sampling_notices(config), *_unused_notices(config)]


def _model_paths(config: PPOConfig) -> dict[str, str]:
    """Every model and tokenizer folder that is set, by its key."""
    student, teacher = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    paths = {
        "actor_rollout_ref.model.path": student.path,
        "actor_rollout_ref.ref.model.path": teacher.path,
        **{f"algorithm.distill.teachers.{name}.path": t.path for name, t in config.algorithm.distill.teachers.items()},
        "actor_rollout_ref.model.tokenizer_path": student.tokenizer_path,
        "actor_rollout_ref.ref.model.tokenizer_path": teacher.tokenizer_path,
    }
    return {key: path for key, path in paths.items() if path}


def _model_errors(config: PPOConfig) -> Iterator[str]:
    """Every model must be found, and be long enough for the run by its config.json."""
    models = config.actor_rollout_ref
    if not models.model.path:
        yield "actor_rollout_ref.model.path is not set; give the student's folder or hub name"
    for key, path in _model_paths(config).items():
        folder = local_model_folder(path)
        if folder is None:
            yield from _missing_folder_errors(key, path)
            continue
        if key.endswith("tokenizer_path"):
            continue
        try:
            described: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            yield f"{key}={path} holds no config.json; give a model folder in Hugging Face format"
            continue
        except json.JSONDecodeError as error:
            yield f"{key}={path}: config.json is no JSON ({error}); copy the model again"
            continue
        if key == "actor_rollout_ref.model.path":
            described |= models.model.override_config
        yield from _length_errors(f"{key}={path}", described, config)
        replacement = models.ref.ref_replace_token_id
        if key == "actor_rollout_ref.ref.model.path" and replacement is not None and "vocab_size" in described:
            rows = described["vocab_size"]
            if not 0 <= replacement < rows:
                yield (
                    f"actor_rollout_ref.ref.ref_replace_token_id={replacement} is no id of {key}={path} with "
                    f"vocab_size={rows}; give one below it, or null for the pad id"
                )


def _missing_folder_errors(key: str, path: str) -> Iterator[str]:
    """Errors for a model that is not on this machine, unless it can be fetched from the hub."""
    from huggingface_hub import constants

    if Path(path).expanduser().exists():
        yield f"{key}={path} is a file; give the folder it lies in"
    elif not _is_hub_name(path):
        yield f"{key}={path}: there is no such folder; correct the path, or give a hub name (owner/name)"
    elif constants.HF_HUB_OFFLINE:
        yield (
            f"{key}={path} is neither a folder nor in the local hub cache, and HF_HUB_OFFLINE forbids to fetch it; "
            "correct the path, or unset HF_HUB_OFFLINE"
        )


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


def _length_errors(model: str, described: dict[str, Any], config: PPOConfig) -> Iterator[str]:
    limit, rollout = described.get("max_position_embeddings"), config.actor_rollout_ref.rollout
    longest = rollout.prompt_length + rollout.response_length
    ropes = (described.get(name) for name in ("rope_parameters", "rope_scaling"))
    stretched = any(isinstance(rope, dict) and rope.get("rope_type", "default") != "default" for rope in ropes)
    if limit is not None and longest > limit and not stretched:
        yield (
            f"data.max_prompt_length={rollout.prompt_length} + data.max_response_length={rollout.response_length} = "
            f"{longest} is above max_position_embeddings={limit} of {model}; shorten one of them"
        )


def _algorithm_errors(config: PPOConfig) -> Iterator[str]:
    """The estimator must be known, and what it learns from be given."""
    # torch comes with it, which --help has to do without.
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    algorithm, best_metric = config.algorithm, config.trainer.best_metric
    has_reward = config.custom_reward_function.path is not None
    if algorithm.adv_estimator not in ADV_ESTIMATOR_REGISTRY:
        known = ", ".join(sorted(ADV_ESTIMATOR_REGISTRY))
        yield f"algorithm.adv_estimator={algorithm.adv_estimator!r} is unknown; choose from {known}"
    if algorithm.distils and not config.actor_rollout_ref.ref.model.path:
        coef = algorithm.distill.coef
        why = f"algorithm.distill.coef={coef}" if coef else f"algorithm.adv_estimator={algorithm.adv_estimator}"
        yield (
            f"actor_rollout_ref.ref.model.path is not set, and {why} learns from a teacher; give the teacher's folder "
            "or hub name"
        )
    if algorithm.learns_from_reward and not has_reward:
        yield algorithm.missing_reward
    rewards = [name for name in BestRule.parse(best_metric).names if name.endswith("/reward")] if best_metric else []
    if rewards and not has_reward:
        yield (
            f"trainer.best_metric={best_metric!r} reads {', '.join(rewards)}, which needs a reward function; set "
            "custom_reward_function.path, or take another metric, such as val/reverse_kl min"
        )


def _data_errors(config: PPOConfig) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    if not data.train_files:
        yield "data.train_files is not set; give a parquet file, a folder, a glob or a list of these"
    if not data.val_files and trainer.val_only:
        yield "trainer.val_only=True needs data.val_files; set it"
    elif not data.val_files and trainer.best_metric:
        yield f"trainer.best_metric={trainer.best_metric!r} needs data.val_files; set it"
    if data.custom_cls.path:  # reads what it likes
        if data.custom_cls.path.endswith(".py") and not Path(data.custom_cls.path).expanduser().is_file():
            yield f"data.custom_cls.path={data.custom_cls.path}: there is no such file; correct the path"
    else:
        wanted = {"messages", data.prompt_key}
        fix = (
            f"neither a column 'messages' nor data.prompt_key={data.prompt_key!r}",
            "name the column that holds the messages in data.prompt_key",
        )
        yield from _file_errors("data.train_files", data.train_files, wanted, fix)
        yield from _file_errors("data.val_files", data.val_files, wanted, fix)
    synthetic = data.synthetic_item_prompts
    if synthetic.count:
        fix = ("no column 'sid'", "write a list of codes per item")
        yield from _file_errors("data.synthetic_item_prompts.catalogue", synthetic.catalogue, {"sid"}, fix)


def _file_errors(key: str, files: str | list[str] | None, wanted: set[str], fix: tuple[str, str]) -> Iterator[str]:
    """Errors for parquet files that cannot be found or read, or that have none of the wanted columns."""
    # pyarrow comes with it, which --help has to do without.
    from verl.utils.dataset.parquet_files import expand_data_files, read_header

    patterns = [files] if isinstance(files, str) else files or []
    columns: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = expand_data_files(pattern)
        except ValueError:
            yield f"{key}={pattern} matches no parquet file; correct the path"
            continue
        for name in names:
            try:
                columns |= dict.fromkeys(read_header(name)[0])
            except ValueError as error:
                yield f"{key}={error}"
    if columns and not wanted & set(columns):
        yield f"{key}={', '.join(patterns)} has {fix[0]}, only {', '.join(columns)}; {fix[1]}"


def _engine_errors(config: PPOConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "vllm" and not is_installed("vllm"):
        yield (
            "actor_rollout_ref.rollout.name=vllm needs vLLM, which is not installed; run deploy_env.sh, or set it to hf"
        )
    if not _is_agent_loop(rollout.agent.default_agent_loop):
        yield (
            f"actor_rollout_ref.rollout.agent.default_agent_loop={rollout.agent.default_agent_loop!r} is unknown; use "
            f"{' or '.join(AGENT_LOOPS)}, or register one's own (verl.experimental.agent_loop.base.register) in a "
            "module that this process imports, and the agent-loop workers through "
            "ray_kwargs.ray_init.runtime_env.worker_process_setup_hook"
        )


def _is_agent_loop(name: str) -> bool:
    if name in AGENT_LOOPS:
        return True
    # transformers comes with it, which only a loop of the user's own is worth.
    from verl.experimental.agent_loop.base import get_agent_loop_class

    try:
        get_agent_loop_class(name)
    except ValueError:
        return False
    return True


def _output_errors(config: PPOConfig) -> Iterator[str]:
    for name in ("rollout_data_dir", "validation_data_dir", "ray_timeline_dir"):
        folder = getattr(config.trainer, name)
        if folder and not _is_writable(Path(folder).expanduser()):
            yield f"trainer.{name}={folder} cannot be written; give a folder that can"


def is_installed(package: str) -> bool:
    """Whether ``import package`` would find something; imports nothing."""
    return importlib.util.find_spec(package) is not None


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or it can be made itself."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _hub_notices(config: PPOConfig) -> Iterator[str]:
    for key, path in _model_paths(config).items():
        if local_model_folder(path) is None:
            yield f"{key}={path} is no local folder; it will be fetched from the hub"


def _algorithm_notices(config: PPOConfig) -> Iterator[str]:
    algorithm, rollout = config.algorithm, config.actor_rollout_ref.rollout
    coef = algorithm.distill.coef
    if coef and rollout.extend_vocab_start_token is not None and not algorithm.distill.extended_sources:
        yield (
            f"algorithm.distill.coef={coef}: no teacher knows item tokens, so that an answer is trained up to its "
            "first one, and a reward for items teaches nothing behind it; let the frozen student score such rows: "
            "++algorithm.distill.teachers.self='{vocabulary: full, sources: [rec_*], weight: 1}' (weight 0: the reward "
            "alone)"
        )
    if algorithm.adv_estimator in GROUP_BASELINES and rollout.n == 1:
        yield (
            f"algorithm.adv_estimator={algorithm.adv_estimator} compares the answers to one prompt, and "
            "actor_rollout_ref.rollout.n=1 gives it one: the reward itself is the advantage; set n to 4 or more"
        )


def _sampling_notices(config: PPOConfig) -> Iterator[str]:
    rollout, bound = config.actor_rollout_ref.rollout, config.trainer.engine_gap_bound
    cuts_tail = rollout.top_p < 1 or rollout.top_k != -1
    if bound is not None and (cuts_tail or not rollout.calculate_log_probs):
        yield (
            f"trainer.engine_gap_bound={bound} has no effect here: the engine is compared with the trainer where "
            "actor_rollout_ref.rollout.calculate_log_probs=True, top_p=1 and top_k=-1, and they are "
            f"{rollout.calculate_log_probs}, {rollout.top_p} and {rollout.top_k}"
        )
    if cuts_tail and config.algorithm.rollout_correction.rollout_is is None:
        correction = (
            ", or algorithm.rollout_correction.rollout_is=token with actor_rollout_ref.rollout.calculate_log_probs=True"
        )
        yield (
            f"biased: actor_rollout_ref.rollout.top_p={rollout.top_p} and top_k={rollout.top_k} cut the tail off the "
            "sampler, and the loss treats its answers as the whole policy's; set top_p=1 and top_k=-1"
            f"{correction if config.algorithm.distill.has_policy_loss else ''}"
        )
    key, validation = "actor_rollout_ref.rollout.val_kwargs", rollout.val_kwargs
    if config.data.val_files and validation.greedy and config.algorithm.distils:
        yield (
            f"validation is greedy ({key}.do_sample={validation.do_sample}, {key}.temperature="
            f"{validation.temperature}): val/reverse_kl, which drawn answers estimate, will not be measured; set "
            f"{key}.do_sample=True and {key}.temperature above 0 to have it"
        )


def _unused_notices(config: PPOConfig) -> Iterator[str]:
    """Settings that nothing reads and that do no harm: often they are left over from another run."""
    algorithm, rollout, synthetic = (
        config.algorithm,
        config.actor_rollout_ref.rollout,
        config.data.synthetic_item_prompts,
    )
    if config.trainer.test_freq > 0 and not config.data.val_files:
        yield f"trainer.test_freq={config.trainer.test_freq} has no effect: data.val_files is not set"
    for engine in rollout.engine_kwargs:
        if engine != rollout.name:
            yield (
                f"actor_rollout_ref.rollout.engine_kwargs.{engine} is accepted and has no effect here: "
                f"actor_rollout_ref.rollout.name={rollout.name}"
            )
    why = ""
    if algorithm.distill.is_exact:
        why = f"algorithm.distill.objective={algorithm.distill.objective} compares distributions"
    elif not algorithm.distils:
        why = f"algorithm.adv_estimator={algorithm.adv_estimator} learns from no teacher"
    for name, usual in USUAL_ADV_BOUNDS.items():
        bound = getattr(algorithm, name)
        if why and bound not in (None, usual):
            yield f"algorithm.{name}={bound} has no effect here: it bounds the advantage of drawn tokens, and {why}"
    for name in ("templates", "catalogue"):
        if not synthetic.count and getattr(synthetic, name):
            yield (
                f"data.synthetic_item_prompts.{name} has no effect here: data.synthetic_item_prompts.count=0 makes no "
                "prompts"
            )

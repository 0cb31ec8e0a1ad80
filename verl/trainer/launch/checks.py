"""What can be wrong with a run outside its configuration, found before anything heavy starts.

In: a ``PPOConfig``, whose sections have checked themselves. Looks at folders, JSON and parquet headers, and installed
packages. Loads no model, no tokenizer and no row; starts nothing. All errors come at once. Whether the vocabularies
of student and teacher fit together is left to ``verl.utils.vocab_contract``.
"""

import importlib.util
import os
from pathlib import Path

from verl.config.algorithm import USUAL_ADV_BOUNDS
from verl.config.best_rule import BestRule
from verl.config.findings import Findings
from verl.config.ppo import PPOConfig
from verl.config.rollout import AGENT_LOOPS
from verl.trainer.launch.model_checks import check_models

GROUP_BASELINES = ("grpo", "rloo")
"""Estimators whose baseline is the other answers to a prompt."""
LOGGER_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


def check_run(config: PPOConfig) -> list[str]:
    """Look for user errors.

    Returns:
        Notices, a line each, for the caller to log.

    Raises:
        ValueError: what has to change before the run can start, a line each with key, value and fix.
    """
    found = Findings()
    checks = (
        check_models,
        _check_estimator,
        _check_reward,
        _check_data,
        _check_engine,
        _check_sampling,
        _check_outputs,
        _check_idle_settings,
    )
    for check in checks:
        check(config, found)
    if found.errors:
        raise ValueError("\n".join(found.errors))
    return found.notices


def _check_estimator(config: PPOConfig, found: Findings) -> None:
    # torch comes with it, which --help has to do without.
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = config.algorithm.adv_estimator
    if name not in ADV_ESTIMATOR_REGISTRY:
        known = ", ".join(sorted(ADV_ESTIMATOR_REGISTRY))
        found.errors.append(f"algorithm.adv_estimator={name!r} is unknown; choose from {known}")
    algorithm, start = config.algorithm, config.actor_rollout_ref.rollout.extend_vocab_start_token
    if algorithm.distils and not config.actor_rollout_ref.ref.model.path:
        coef = algorithm.distill.coef
        why = f"algorithm.distill.coef={coef}" if coef else f"algorithm.adv_estimator={name}"
        found.errors.append(
            f"actor_rollout_ref.ref.model.path is not set, and {why} learns from a teacher; give the teacher's folder "
            "or hub name"
        )
    if algorithm.distill.coef and start is not None and not algorithm.distill.extended_sources:
        found.notices.append(
            f"algorithm.distill.coef={algorithm.distill.coef}: no teacher knows item tokens, so that an answer is "
            "trained up to its first one, and a reward for items teaches nothing behind it; let the frozen student "
            "judge such rows: ++algorithm.distill.teachers.self='{vocabulary: full, sources: [rec_*], weight: 1}' "
            "(weight 0: the reward alone)"
        )


def _check_reward(config: PPOConfig, found: Findings) -> None:
    algorithm, trainer = config.algorithm, config.trainer
    has_reward = config.custom_reward_function.path is not None
    if algorithm.learns_from_reward and not has_reward:
        found.errors.append(algorithm.missing_reward)
    if algorithm.adv_estimator in GROUP_BASELINES and config.actor_rollout_ref.rollout.n == 1:
        found.notices.append(
            f"algorithm.adv_estimator={algorithm.adv_estimator} compares the answers to one prompt, and "
            "actor_rollout_ref.rollout.n=1 gives it one: the reward itself is the advantage; set n to 4 or more"
        )
    named = BestRule.parse(trainer.best_metric).names if trainer.best_metric else []
    rewards = [name for name in named if name.endswith("/reward")]
    if rewards and not has_reward:
        found.errors.append(
            f"trainer.best_metric={trainer.best_metric!r} reads {', '.join(rewards)}, which nothing gives; set "
            "custom_reward_function.path, or take another figure, such as val/reverse_kl min"
        )


def _check_data(config: PPOConfig, found: Findings) -> None:
    data = config.data
    if not data.train_files:
        found.errors.append("data.train_files is not set; give a parquet file, a folder, a glob or a list of these")
    rows = _check_files("data.train_files", data.train_files, config, found)
    _check_files("data.val_files", data.val_files, config, found)
    _check_catalogue(config, found)
    if rows is not None and data.train_max_samples > 0:
        rows = min(rows, data.train_max_samples)
    if rows is not None:
        rows += data.synthetic_item_prompts.count
    if rows is not None and rows < data.train_batch_size:
        found.errors.append(
            f"data.train_batch_size={data.train_batch_size} is more than the {rows} rows of "
            f"data.train_files={data.train_files}; lower it"
        )
    if not data.val_files and config.trainer.val_only:
        found.errors.append("trainer.val_only=True needs data.val_files; set it")
    elif not data.val_files and config.trainer.best_metric:
        found.errors.append(f"trainer.best_metric={config.trainer.best_metric!r} needs data.val_files; set it")
    elif not data.val_files and config.trainer.test_freq > 0:
        found.notices.append(f"trainer.test_freq={config.trainer.test_freq} has no effect: data.val_files is not set")
    scripts = {
        "data.custom_cls.path": data.custom_cls.path,
        "custom_reward_function.path": config.custom_reward_function.path,
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": (
            config.actor_rollout_ref.rollout.multi_turn.tool_config_path
        ),
    }
    for key, path in scripts.items():
        is_file_name = path is not None and (os.sep in path or path.endswith((".py", ".yaml", ".yml", ".json")))
        if path and is_file_name and not Path(path).expanduser().is_file():
            found.errors.append(f"{key}={path}: there is no such file; correct the path")


def _check_files(key: str, files: str | list[str] | None, config: PPOConfig, found: Findings) -> int | None:
    """Check the headers of parquet files; their rows in all, None where that is unknown."""
    # pyarrow comes with it, which --help has to do without.
    from verl.utils.dataset.parquet_files import expand_data_files, read_header

    patterns = [files] if isinstance(files, str) else files or []
    columns: dict[str, None] = {}
    rows: int | None = None
    for pattern in patterns:
        try:
            names = expand_data_files(pattern)
        except ValueError:
            found.errors.append(f"{key}={pattern} matches no parquet file; correct the path")
            continue
        for name in names:
            if config.data.custom_cls.path:
                continue  # a data set class of the user's own reads what it likes
            try:
                header, count = read_header(name)
            except ValueError as error:
                found.errors.append(f"{key}={error}")
                continue
            columns |= dict.fromkeys(header)
            rows = (rows or 0) + count
    if columns and not {"messages", config.data.prompt_key} & set(columns):
        found.errors.append(
            f"{key}={', '.join(patterns)} has neither a column 'messages' nor data.prompt_key="
            f"{config.data.prompt_key!r}, only {', '.join(columns)}; name the column that holds the messages in "
            "data.prompt_key"
        )
    return rows


def _check_catalogue(config: PPOConfig, found: Findings) -> None:
    """Look for the items of ``data.synthetic_item_prompts``; whether the student has their tokens is seen later."""
    from verl.utils.dataset.parquet_files import column_names, expand_data_files

    synthetic = config.data.synthetic_item_prompts
    if not synthetic.count or synthetic.catalogue is None:
        return
    key = f"data.synthetic_item_prompts.catalogue={synthetic.catalogue}"
    try:
        columns = column_names(expand_data_files(synthetic.catalogue))
    except ValueError as error:
        found.errors.append(f"{key}: {error}")
        return
    if "sid" not in columns:
        found.errors.append(f"{key} has no column 'sid' (a list of codes per item), only {', '.join(sorted(columns))}")


def _check_engine(config: PPOConfig, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "vllm" and not is_installed("vllm"):
        found.errors.append(
            "actor_rollout_ref.rollout.name=vllm needs vLLM, which is not installed; run deploy_env.sh, or set it to hf"
        )
    for engine in rollout.engine_kwargs:
        if engine != rollout.name:
            found.notices.append(
                f"actor_rollout_ref.rollout.engine_kwargs.{engine} is accepted and has no effect here: "
                f"actor_rollout_ref.rollout.name={rollout.name}"
            )
    if not _is_agent_loop(rollout.agent.default_agent_loop):
        found.errors.append(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={rollout.agent.default_agent_loop!r} is unknown; use "
            f"{' or '.join(AGENT_LOOPS)}, or register one's own (verl.experimental.agent_loop.base.register) in a "
            "module that this process imports, and the agent-loop workers through "
            "ray_kwargs.ray_init.runtime_env.worker_process_setup_hook"
        )


def _is_agent_loop(name: str) -> bool:
    if name in AGENT_LOOPS:
        return True
    # transformers comes with it; only a loop of the user's own is worth that here.
    from verl.experimental.agent_loop.base import get_agent_loop_class

    try:
        get_agent_loop_class(name)
    except ValueError:
        return False
    return True


def _check_sampling(config: PPOConfig, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    cuts_tail = rollout.top_p < 1 or rollout.top_k != -1
    if config.trainer.engine_gap_bound is not None and (cuts_tail or not rollout.calculate_log_probs):
        found.notices.append(
            f"trainer.engine_gap_bound={config.trainer.engine_gap_bound} has no effect here: the engine is compared "
            "with the trainer where actor_rollout_ref.rollout.calculate_log_probs=True, top_p=1 and top_k=-1, and they "
            f"are {rollout.calculate_log_probs}, {rollout.top_p} and {rollout.top_k}"
        )
    if cuts_tail and config.algorithm.rollout_correction.rollout_is is None:
        correction = (
            ", or algorithm.rollout_correction.rollout_is=token with actor_rollout_ref.rollout.calculate_log_probs=True"
        )
        found.notices.append(
            f"biased: actor_rollout_ref.rollout.top_p={rollout.top_p} and top_k={rollout.top_k} cut the tail off the "
            "sampler, and the loss treats its answers as the whole policy's; set top_p=1 and top_k=-1"
            f"{correction if config.algorithm.distill.has_policy_loss else ''}"
        )
    validation = rollout.val_kwargs
    if config.data.val_files and validation.greedy and config.algorithm.distils:
        key = "actor_rollout_ref.rollout.val_kwargs"
        found.notices.append(
            f"validation is greedy ({key}.do_sample={validation.do_sample}, {key}.temperature="
            f"{validation.temperature}): val/reverse_kl, which drawn answers estimate, will not be measured; set "
            f"{key}.do_sample=True and {key}.temperature above 0 to have it"
        )


def _check_outputs(config: PPOConfig, found: Findings) -> None:
    trainer = config.trainer
    for name in trainer.logger:
        if name in LOGGER_PACKAGES and not is_installed(LOGGER_PACKAGES[name]):
            found.errors.append(
                f"trainer.logger={trainer.logger} needs the package {LOGGER_PACKAGES[name]}, which is not installed; "
                f"install it, or leave {name} out"
            )
    for name in ("default_local_dir", "rollout_data_dir", "validation_data_dir", "ray_timeline_dir"):
        folder = getattr(trainer, name)
        if folder and not _is_writable(Path(folder).expanduser()):
            found.errors.append(f"trainer.{name}={folder} cannot be written; give a folder that can")
    if trainer.resume_mode == "resume_path" and not Path(str(trainer.resume_from_path)).expanduser().is_dir():
        found.errors.append(
            f"trainer.resume_from_path={trainer.resume_from_path}: there is no such folder; correct the path"
        )


def _check_idle_settings(config: PPOConfig, found: Findings) -> None:
    """What was set and nothing reads, where it does no harm: often it is left over from another run."""
    algorithm, synthetic = config.algorithm, config.data.synthetic_item_prompts
    if algorithm.distill.is_exact or not algorithm.distils:
        why = (
            f"algorithm.distill.objective={algorithm.distill.objective} compares distributions"
            if algorithm.distill.is_exact
            else f"algorithm.adv_estimator={algorithm.adv_estimator} learns from no teacher"
        )
        for name, usual in USUAL_ADV_BOUNDS.items():
            bound = getattr(algorithm, name)
            if bound not in (None, usual):
                found.notices.append(
                    f"algorithm.{name}={bound} has no effect here: it bounds the advantage of drawn tokens, and {why}"
                )
    if not synthetic.count:
        for name in ("templates", "catalogue"):
            if getattr(synthetic, name):
                found.notices.append(
                    f"data.synthetic_item_prompts.{name} has no effect here: data.synthetic_item_prompts.count=0 makes "
                    "no prompts"
                )


def is_installed(package: str) -> bool:
    """Whether ``import package`` would find something; imports nothing."""
    return importlib.util.find_spec(package) is not None


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or it can be made itself."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)

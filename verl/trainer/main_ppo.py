"""Entry point for task rewards; a recipe's own goes the same way: command line, typed settings, checks, classes, run.

::

    python -m verl.trainer.main_ppo actor_rollout_ref.model.path=MODEL data.train_files=TRAIN.parquet \\
        custom_reward_function.path=REWARD.py

Settings, files and vocabularies are checked before Ray starts. Heavy imports wait until then, so ``--help`` is quick.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from verl.config import PPOConfig
from verl.trainer.checkpoint.layout import NothingToTrain
from verl.trainer.launch.checks import check_ranks, check_run, prepare_folders
from verl.trainer.launch.typed import normalized_argv, to_typed
from verl.utils.console import escape_unknown_characters
from verl.utils.import_utils import import_external_modules
from verl.utils.loopback import joins_cluster, keep_to_loopback, stays_here

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)


def build_trainer(
    config: PPOConfig,
    trainer_class: "type[RayPPOTrainer] | None" = None,
    make_prompts: Callable[..., Path] | None = None,
) -> "RayPPOTrainer":
    """Tokenizer, data, reward function and worker classes, put together; starts nothing.

    An ``extend_vocab_start_token`` that is ``auto`` becomes the id it stands for.

    Args:
        trainer_class: the trainer of a recipe; None: ``RayPPOTrainer``, which learns from a task reward alone.
        make_prompts: makes the file of ``data.synthetic_item_prompts`` of ``data`` and the tokenizer; None: none.

    Raises:
        ValueError: settings, files, models or a user's own code that this run cannot work with.
    """
    from verl.experimental.agent_loop.base import get_agent_loop_class, load_agent_loops
    from verl.experimental.agent_loop.worker import chat_template, check_carries, load_tools
    from verl.trainer.data import build_datasets
    from verl.trainer.launch.vocabulary_check import check_servers, resolve_vocabulary
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.reward import load_reward_fn
    from verl.utils.device import get_device_name
    from verl.utils.tokenizer import hf_tokenizer

    algorithm, makes_prompts = config.algorithm, config.data.synthetic_item_prompts.count > 0
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    if (algorithm.distils and trainer_class is None) or (makes_prompts and make_prompts is None):
        what = f"algorithm.adv_estimator={algorithm.adv_estimator}" if algorithm.distils else "synthetic_item_prompts"
        raise ValueError(f"{what} is for distillation; run python -m recipe.onpolicy_distill.main_onpolicy_distill")
    device_name = get_device_name(config.trainer.device, elsewhere=joins_cluster(config.ray_kwargs.ray_init))
    check_ranks(config, device_name)
    prepare_folders(config.trainer)
    reward_fn = load_reward_fn(config.custom_reward_function)
    load_agent_loops(rollout.agent.agent_loop_config_path)
    get_agent_loop_class(rollout.agent.default_agent_loop)
    # First of what reads the threshold: here auto becomes a number.
    contract = resolve_vocabulary(config)
    check_servers(config)
    tokenizer = hf_tokenizer(model.tokenizer_path or str(model.path), trust_remote_code=model.trust_remote_code)
    # Tools that the chat template does not fit are refused here, before Ray starts.
    template = chat_template(config, tokenizer, load_tools(rollout))
    datasets = build_datasets(
        config.data,
        tokenizer,
        made=make_prompts(config.data, tokenizer) if make_prompts and makes_prompts else None,
        extend_vocab_start_token=rollout.extend_start,
        extended_sources=algorithm.distill.extended_sources if config.scores_without_extended else ["*"],
        tool_schemas=template.tool_schemas,
        dropped_rows_folder=config.trainer.default_local_dir,
        **({"hint_columns": hints} if (hints := config.hint_columns) else {}),  # classes of users need not take it
    )
    loops = [{name or rollout.agent.default_agent_loop for name in read.agent_names} for read in datasets if read]
    for name in set.union(*loops):
        get_agent_loop_class(name)
    check_carries(loops[0], rollout)
    options: dict[str, Any] = {"device_name": device_name, "vocab_fingerprint": contract and contract.fingerprint}
    return (trainer_class or RayPPOTrainer)(config, tokenizer, worker_classes(config), *datasets, reward_fn, **options)


def worker_classes(config: PPOConfig) -> dict[str, type]:
    """What computes each role: workers of the run, or servers."""
    from verl.workers.model_workers import StudentWorker, TeacherWorker
    from verl.workers.served_teacher import ServedTeacher

    teachers = dict.fromkeys(config.algorithm.distill.roles, TeacherWorker)
    return {"actor": StudentWorker, **teachers, **dict.fromkeys(config.served_roles, ServedTeacher)}


def start(cfg: DictConfig, build: "Callable[[PPOConfig], RayPPOTrainer]") -> None:
    """Type and check a composed configuration, read the data, then run; a run that has ended already says so; one that
    only checks ends before Ray.

    Raises:
        SystemExit: a user's mistake, with its message, or the run did not reach its last step.
    """
    try:
        config = to_typed(cfg)
        if stays_here(config.ray_kwargs.ray_init):
            # Before Ray is imported, which reads some of these variables only then.
            keep_to_loopback()
        if modules := config.actor_rollout_ref.model.external_lib:
            import_external_modules(modules)
        for notice in check_run(config):
            logger.warning(notice)
        trainer = build(config)
    except NothingToTrain as end:
        print(end)
        return
    except ValueError as error:
        sys.exit(f"error: {error}")
    if config.trainer.check_only:
        print(f"checked: {len(trainer.train_dataset):,} prompts; nothing was started")
        return
    from verl.trainer.launch.run import run

    run(trainer)


def run_command_line(module: str, config_name: str, build: "Callable[[PPOConfig], RayPPOTrainer]") -> None:
    """Accept the command line as users of verl write it, compose the configuration and run.

    Args:
        module: the entry point, beside whose folder ``config`` lies.
        config_name: YAML there, unless ``--config-name`` gives another.
        build: makes the trainer.
    """
    composed: list[tuple[DictConfig, Any]] = []

    def hydra_main(cfg: DictConfig) -> None:
        composed.append((cfg, HydraConfig.instance().cfg))

    hydra_main.__module__ = module  # beside which Hydra looks for config_path
    escape_unknown_characters()
    try:
        sys.argv[1:] = normalized_argv(sys.argv[1:])
        hydra.main(version_base=None, config_path="config", config_name=config_name)(hydra_main)()
    except ValueError as error:  # of ours, or of Hydra about flags that exclude each other
        sys.exit(f"error: {error}")
    # Outside of Hydra, which would report what a run raises after all overrides and without most of its traceback.
    for cfg, of_hydra in composed:
        HydraConfig.instance().cfg = of_hydra  # what ${hydra:...} in it stands for
        start(cfg, build)


if __name__ == "__main__":
    run_command_line("verl.trainer.main_ppo", "ppo_trainer", build_trainer)

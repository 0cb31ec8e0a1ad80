"""Entry point: Hydra -> typed config -> checks -> concrete classes -> ``verl.trainer.launch.run``.

::

    python -m recipe.onpolicy_distill.main_onpolicy_distill \\
        actor_rollout_ref.model.path=STUDENT actor_rollout_ref.ref.model.path=TEACHER data.train_files=TRAIN.parquet

Settings, files and vocabularies are checked before Ray starts. Heavy imports wait until then, so ``--help`` is quick.
"""

import logging
import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from verl.trainer.launch.checks import check_ranks, check_run, prepare_folders
from verl.trainer.launch.typed import normalized_argv, to_typed
from verl.utils.console import escape_unknown_characters
from verl.utils.loopback import keep_to_loopback, stays_here

if TYPE_CHECKING:
    from verl.config import PPOConfig
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)


def build_trainer(config: "PPOConfig") -> "RayPPOTrainer":
    """Tokenizer, data, reward function and worker classes, put together; starts nothing.

    The algorithm decides the trainer: one learns from teachers, alone or beside a task reward, the other from a task
    reward alone.
    An ``extend_vocab_start_token`` that is ``auto`` becomes the id it stands for.
    """
    from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
    from recipe.onpolicy_distill.synthetic_item_prompts import make_prompt_file
    from verl.experimental.agent_loop.base import ChatTemplate
    from verl.experimental.agent_loop.worker import load_tools
    from verl.tools.schemas import schema_dict
    from verl.trainer.data import build_datasets
    from verl.trainer.launch.vocabulary_check import resolve_vocabulary
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.reward import load_reward_fn
    from verl.utils.device import get_device_name
    from verl.utils.tokenizer import hf_tokenizer
    from verl.workers.model_workers import StudentWorker, TeacherWorker

    device_name = get_device_name(config.trainer.device)
    check_ranks(config, device_name)
    prepare_folders(config.trainer)
    reward_fn = load_reward_fn(config.custom_reward_function)
    # First of what reads the threshold: here auto becomes a number.
    contract = resolve_vocabulary(config)
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    distill = config.algorithm.distill
    tokenizer = hf_tokenizer(model.tokenizer_path or str(model.path), trust_remote_code=model.trust_remote_code)
    tool_schemas = [schema_dict(tool.get_openai_tool_schema()) for tool in load_tools(rollout).values()]
    # Tools that the chat template does not fit are refused here, before Ray starts.
    ChatTemplate(tokenizer, tool_schemas, config.data.apply_chat_template_kwargs)
    train_dataset, val_dataset = build_datasets(
        config.data,
        tokenizer,
        made=make_prompt_file(config.data, tokenizer) if config.data.synthetic_item_prompts.count else None,
        extend_vocab_start_token=rollout.extend_start,
        extended_sources=distill.extended_sources if config.scores_without_extended else ["*"],
        tool_schemas=tool_schemas,
        dropped_rows_folder=config.trainer.default_local_dir,
    )
    trainer_class = RayOnPolicyDistillTrainer if config.algorithm.distils else RayPPOTrainer
    return trainer_class(
        config,
        tokenizer,
        {"actor": StudentWorker, **dict.fromkeys(distill.roles, TeacherWorker)},
        train_dataset,
        val_dataset,
        reward_fn,
        device_name=device_name,
        vocab_fingerprint=contract.fingerprint if contract else None,
    )


@hydra.main(version_base=None, config_path="config", config_name="onpolicy_distill_trainer")
def hydra_main(cfg: DictConfig) -> None:
    """Compose, type and check the configuration, read the data, then run."""
    try:
        config = to_typed(cfg)
        if stays_here(config.ray_kwargs.ray_init):
            # Before Ray is imported, which reads some of these variables only then.
            keep_to_loopback()
        for notice in check_run(config):
            logger.warning(notice)
        trainer = build_trainer(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from verl.trainer.launch.run import run

    run(trainer)


def main() -> None:
    """Accept the command line as users of verl write it, then hand it to Hydra."""
    escape_unknown_characters()
    try:
        sys.argv[1:] = normalized_argv(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    hydra_main()


if __name__ == "__main__":
    main()

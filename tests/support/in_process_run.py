"""Small distillation runs in this process, which a test may kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from support.file_faults import Killed
from support.launch import small_run
from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.trainer.launch.typed import load_config

STEPS = 5
"""Of a run by default."""


def settings(pair: Any, train: Path, folder: Path, **changes: Any) -> PPOConfig:
    """A small distillation with the transformers engine; every step leaves a checkpoint."""
    values = {
        "actor_rollout_ref.model.path": pair.student,
        "actor_rollout_ref.ref.model.path": pair.teacher,
        "actor_rollout_ref.rollout.extend_vocab_start_token": pair.extend_vocab_start_token,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.total_training_steps": -1,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "algorithm.adv_estimator": "on_policy_distill",
        "data.train_files": train,
        "data.cache_dir": train.parent / "cache",
        "data.train_batch_size": 4,
        "data.max_response_length": 8,
        "trainer.default_local_dir": folder,
        "trainer.save_freq": 1,
        "trainer.device": "cpu",
        "trainer.logger": "[file]",
        **changes,
    }
    return load_config(small_run("hf", 1, STEPS, **values))


def run_in_process(
    config: PPOConfig, dies_in_batch: int | None = None, tamper: Callable[[Any], None] | None = None
) -> None:
    """Train as ``main_onpolicy_distill`` does, until the end or the kill.

    Args:
        dies_in_batch: number of the batch, from 1, during which the process ends; None: none.
        tamper: gets the trainer before it starts, to break something.
    """
    trainer: Any = build_trainer(config)
    trainer.init_workers(in_process=True)
    generate, batches = trainer.agent_loop_manager.generate_sequences, 0

    def generate_or_die(prompts: DataProto) -> DataProto:
        nonlocal batches
        batches += 1
        if batches == dies_in_batch:
            raise Killed
        return generate(prompts)

    trainer.agent_loop_manager.generate_sequences = generate_or_die
    try:
        if tamper is not None:
            tamper(trainer)
        trainer.fit()
    except Killed:
        trainer.actor_wg.checkpoint_outcome(True)  # its thread would outlive the kill here
    finally:
        trainer.shutdown()

"""A distillation run in this process, which a test may kill."""

from collections.abc import Callable
from typing import Any

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.in_process import init_in_process


class Killed(BaseException):
    """The process ends here."""


def run_in_process(
    config: PPOConfig, dies_in_batch: int | None = None, tamper: Callable[[Any], None] | None = None
) -> None:
    """Train as ``main_onpolicy_distill`` does, until the end or the kill.

    Args:
        dies_in_batch: number of the batch, from 1, during which the process ends; None: none.
        tamper: gets the trainer before it starts, to break something.
    """
    trainer: Any = build_trainer(config)
    init_in_process(trainer)
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

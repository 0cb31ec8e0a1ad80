"""What every stage of a step has in common: it takes the batch and returns its new keys.

In:  rows of the data set; a batch and a stage. Out: the batch that they begin with; the batch with the stage's keys,
and the seconds it took; the batch in the ranks' order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import balanced_order
from verl.utils.timing import marked_timer


def prompt_batch(rows: dict[str, Any], config: PPOConfig, *, n: int, step: int | None) -> DataProto:
    """Rows of the data set as a batch of prompts, ``n`` copies each, with one ``uid`` per prompt.

    Args:
        step: of training; None: validation, which draws the same random numbers every time.
    """
    prompts, rollout = DataProto.from_single_dict(rows), config.actor_rollout_ref.rollout
    # Sampling seeds follow from these, so training never draws the same ones twice.
    uids = [f"{'val' if step is None else step}-{index}" for index in prompts.non_tensor_batch["index"]]
    prompts.non_tensor_batch["uid"] = np.array(uids, dtype=object)
    prompts.meta_info = {
        "global_steps": step or 0,
        "validate": step is None,
        "temperature": rollout.val_kwargs.temperature if step is None else rollout.temperature,
    }
    return prompts.repeat(n, interleave=True)


def run_stage(
    timing: dict[str, float], name: str, stage: Callable[[DataProto], DataProto], batch: DataProto
) -> DataProto:
    """Run a stage, time it under ``name``, and return the batch with the stage's new keys."""
    with marked_timer(name, timing):
        return batch.union(stage(batch))


def balance_rows(batch: DataProto, config: PPOConfig) -> DataProto:
    """Put the rows, in place, in the order that gives every rank its equal, token-balanced share of a mini-batch."""
    lengths = batch.tensor("attention_mask").sum(-1).tolist()
    models = config.actor_rollout_ref
    order = balanced_order(
        lengths if config.trainer.balance_batch else [1] * len(lengths),
        mini_batch_rows=models.actor.ppo_mini_batch_size * models.rollout.n,
        dp_size=config.trainer.world_size,
    )
    batch.reorder(order)
    return batch


def new_keys(after: DataProto, before: DataProto) -> DataProto:
    """What ``after`` holds and ``before`` lacks."""
    # A TensorDict iterates over rows, so its keys have to be named.
    return after.select(batch_keys=[key for key in after.batch.keys() if key not in before.batch])  # noqa: SIM118

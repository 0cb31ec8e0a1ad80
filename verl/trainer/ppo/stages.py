"""What the trainer does around its stages: make a batch of prompts, run a stage, order rows, answer validation prompts.

In:  rows of the data set; a batch and a stage. Out: the batch with the stage's new keys, and the seconds it took.
Not here: the stages themselves (``ray_trainer``).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import balanced_order
from verl.utils.timing import marked_timer

Metrics = dict[str, float]


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


def answer_all(
    loader: Iterable[dict[str, Any]], answer: Callable[[dict[str, Any]], tuple[DataProto, Metrics]]
) -> tuple[DataProto, Metrics]:
    """Answer every validation prompt.

    Args:
        loader: rows of the data set, batch by batch.
        answer: from such rows to their answers and the metrics of the stages that made them.

    Returns:
        the answers in the order of the data, and the stages' metrics as ``val_<family>/<name>``, timings left out.
        Below ``val/`` they could be taken for those of a data source, in patterns such as ``val/*/reward`` too.
    """
    parts = [answer(rows) for rows in tqdm(loader, desc="validate", unit="batch", leave=False, disable=None)]
    joined = join_metrics([(len(batch), metrics) for batch, metrics in parts])
    metrics = {f"val_{name}": value for name, value in joined.items() if not name.startswith("timing_s/")}
    return DataProto.concat([batch for batch, _ in parts]), metrics


def join_metrics(parts: Sequence[tuple[int, Metrics]]) -> Metrics:
    """Metrics of batches as those of all their rows.

    Names that end in ``max`` or ``min`` keep the extreme, ``agent_loop/*`` counts are added up, all others are means
    weighted by rows. A batch that lacks a metric does not count for it.

    Args:
        parts: rows and metrics of each batch.
    """
    joined: Metrics = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        rows, values = zip(*((count, metrics[name]) for count, metrics in parts if name in metrics), strict=True)
        last = name.rsplit("/", 1)[-1]
        if last in ("max", "min"):
            joined[name] = max(values) if last == "max" else min(values)
        elif name.startswith("agent_loop/") and last != "mean":
            joined[name] = sum(values)
        else:
            joined[name] = sum(count * value for count, value in zip(rows, values, strict=True)) / sum(rows)
    return joined

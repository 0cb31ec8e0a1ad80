"""What training changes on a rank: the student, its optimizer's moments, and models that follow the student.

In:  sharded models and the optimizer. Out: their own tensors, by the keys that they have in a checkpoint's shards, and
averages that have taken a step. Not here: files (``checkpoint``).
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from verl.weight_sync import named_weights
from verl.workers.fsdp.adapter import trained_weights
from verl.workers.fsdp.token_stats_model import TokenStatsModel, reshard

OPTIMIZER = "optimizer."
"""Begins the key of every tensor in the shards that is no parameter; parameters have their Hugging Face names."""


class TrainingState(NamedTuple):
    """What a checkpoint is taken of."""

    module: TokenStatsModel
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    averages: dict[float, TokenStatsModel]
    """Models that follow it, by decay."""


def named_tensors(state: TrainingState, contents: Collection[str]) -> dict[str, torch.Tensor]:
    """The model's and the optimizer's own tensors by key: loading into them loads into the training state.

    Without ``get_state_dict`` of torch: it adds settings of the optimizer, which only a pickle could hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained_weights(state.module).items():
        if "model" in contents:
            tensors[name] = parameter.detach()
        if "optimizer" in contents:
            moments = state.optimizer.state[parameter]
            tensors |= {f"{OPTIMIZER}{key}.{name}": value for key, value in moments.items()}
    return tensors


def named_averages(state: TrainingState) -> dict[str, torch.Tensor]:
    """The same of the models that follow it."""
    averages = ((f"{OPTIMIZER}average_{decay}.", named_weights(model)) for decay, model in state.averages.items())
    return {prefix + name: weight.detach() for prefix, weights in averages for name, weight in weights.items()}


@torch.no_grad()
def follow(average: TokenStatsModel, model: TokenStatsModel, decay: float) -> None:
    """Make the parameters of ``average`` ``decay * average + (1 - decay) * model``, shard by shard, in place.

    Bit for bit what they were where ``decay`` is 1, and the model's where it is 0. Both are sharded alike.
    """
    reshard(average)
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        assert isinstance(mine, DTensor) and isinstance(theirs, DTensor), "both are sharded"
        shard = mine.to_local()
        shard.lerp_(theirs.to_local().to(shard), 1.0 - decay)

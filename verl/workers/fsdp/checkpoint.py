"""Checkpoints of a trained, sharded model.

In:  model, optimizer, schedule and a folder. Out, below that folder::

    shards/              parameters and AdamW state, each rank its part; readable by any number of ranks
    extra_rank_<r>.pt    optimizer steps done, training step, random number generators of rank r
    huggingface/         whole weights, config and tokenizer, loadable by transformers and vLLM

`actor.checkpoint` says which of these are written and read. All ranks call both functions together.
Not here: which checkpoint is the newest, how many stay, the position in the data.
"""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import PreTrainedTokenizerBase

from verl.utils.device import get_rng_states, set_rng_states
from verl.workers.config import CheckpointConfig
from verl.workers.fsdp.optimizer import LearningRateSchedule
from verl.workers.fsdp.token_stats_model import TokenStatsModel
from verl.workers.fsdp.weight_export import gather_whole, named_weights

logger = logging.getLogger(__name__)

SHARDS = "shards"
HUGGINGFACE = "huggingface"


class TrainingState(NamedTuple):
    """What a checkpoint is taken of."""

    module: TokenStatsModel
    optimizer: torch.optim.Optimizer
    schedule: LearningRateSchedule
    tokenizer: PreTrainedTokenizerBase


def _sharded_state(state: TrainingState, contents: list[str]) -> dict[str, torch.Tensor]:
    """Tensors by key, the model's and the optimizer's own: loading into them loads into the training state."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named_weights(state.module).items():
        if "model" in contents:
            tensors[f"model.{name}"] = parameter.detach()
        if "optimizer" in contents:
            moments = state.optimizer.state[parameter]
            tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
    return tensors


def save_checkpoint(state: TrainingState, config: CheckpointConfig, folder: Path, global_step: int) -> None:
    """Write the parts that ``config.save_contents`` names; an older checkpoint in the folder is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _sharded_state(state, config.save_contents)
    if tensors:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / SHARDS, ignore_errors=True)  # shards of other ranks than now would stay
        dist.barrier()
        dcp.save(tensors, checkpoint_id=folder / SHARDS)
    if "extra" in config.save_contents:
        extra = {"global_step": global_step, "optimizer_steps": state.schedule.steps, "rng": get_rng_states()}
        torch.save(extra, folder / f"extra_rank_{dist.get_rank()}.pt")
    if "hf_model" in config.save_contents:
        save_huggingface(state.module, state.tokenizer, folder / HUGGINGFACE)
    dist.barrier()


def save_huggingface(module: TokenStatsModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write whole weights in their stored precision, config and tokenizer; rank 0 collects them in host memory."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in named_weights(module).items():
        whole = gather_whole(parameter, parameter.device, parameter.dtype)
        if dist.get_rank() == 0:
            weights[name] = whole.cpu()
    if dist.get_rank() == 0:
        module.causal_lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def load_checkpoint(state: TrainingState, config: CheckpointConfig, folder: Path) -> None:
    """Read the parts that ``config.load_contents`` names, on as many ranks as there are now.

    Raises:
        ValueError: a part is not there.
    """
    tensors = _sharded_state(state, config.load_contents)
    if tensors:
        if not (folder / SHARDS / ".metadata").is_file():
            raise ValueError(f"{folder} holds no whole {SHARDS}/; choose another checkpoint or resume_mode=disable")
        dcp.load(tensors, checkpoint_id=folder / SHARDS)
    if "extra" in config.load_contents:
        _load_extra(state, folder)
    dist.barrier()


def _load_extra(state: TrainingState, folder: Path) -> None:
    own = folder / f"extra_rank_{dist.get_rank()}.pt"
    path = own if own.is_file() else folder / "extra_rank_0.pt"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; leave 'extra' out of actor.checkpoint.load_contents")
    extra = torch.load(path, weights_only=True)
    state.schedule.go_to(extra["optimizer_steps"])
    if path != own:
        logger.warning("%s has no random state of rank %d; it goes on with its own", folder, dist.get_rank())
        return
    set_rng_states(extra["rng"])

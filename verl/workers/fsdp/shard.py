"""FSDP2 sharding of a `TokenStatsModel`, and moving it between host and GPU.

In:  the model and a device mesh. Out: the same module, its parameters DTensors sharded over the mesh. Blocks are
sharded one by one; the rest (embedding, last norm, head) belongs to the root, so that an embedding shared with the
head is one parameter of one group.

Not here: building the model, gradients' clipping, optimizer steps.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from verl.workers.fsdp.token_stats_model import TokenStatsModel


def shard_model(
    model: TokenStatsModel, mesh: DeviceMesh, precision: MixedPrecisionPolicy, reshard_after_forward: bool
) -> None:
    """Shard in place: every block, then the rest.

    Raises:
        ValueError: the model class does not name its repeated blocks.
    """
    # transformers keeps it for device maps: the classes of a model's repeated blocks.
    names = set(model.causal_lm._no_split_modules or ())
    blocks = [module for module in model.causal_lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model.causal_lm).__name__} cannot be sharded: its _no_split_modules names no blocks")
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    # The root is needed first in backward, so it stays gathered after forward; `reshard` ends that.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters.

    Needed after passes without backward: a parameter that is still gathered would keep its old value through an
    optimizer step, a checkpoint or an export.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def move_parameters(model: nn.Module, device: torch.device) -> None:
    """Move the shards of all parameters, their gradients and all buffers to ``device``."""
    reshard(model)
    # The optimizer knows parameters as objects; torch swaps the content of a DTensor and keeps the object.
    model.to(device)


def move_optimizer_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the optimizer's moments to ``device``; step counts stay where they are."""
    for state in optimizer.state.values():
        for key, value in state.items():
            # AdamW without `fused` or `capturable` keeps its steps on the CPU; they alone have no dimension.
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value.to(device)

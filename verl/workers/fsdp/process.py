"""What every training rank does before it holds a model.

In:  a worker that knows its rank, and settings. Out: its device, a process group over all ranks, a mesh; and checks
of what the settings name. Roles that share a process share the group: the first to come makes it.
"""

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.single_controller.base import Worker
from verl.utils.device import get_device_name, get_process_group_backend, select_device, share_cpu_cores
from verl.workers.fsdp.token_stats_model import TokenStatsModel


class Ranks(NamedTuple):
    """This rank's device, and the mesh of all ranks."""

    device: torch.device
    mesh: DeviceMesh


def join_ranks(worker: Worker, device_setting: str, seed: int) -> Ranks:
    """Meet the other ranks; every rank gets random numbers of its own from ``seed``."""
    device_name = get_device_name(device_setting)
    device = select_device(device_name, worker.local_rank)
    if device_name == "cpu":
        share_cpu_cores(worker.local_world_size)
    worker.init_process_group(get_process_group_backend(device_name))
    torch.manual_seed(seed + worker.rank)
    return Ranks(device, init_device_mesh(device_name, (worker.world_size,)))


def require_path(key: str, path: str | None) -> str:
    """The path that a setting holds.

    Raises:
        ValueError: it holds none.
    """
    if path is None:
        raise ValueError(f"{key} is not set; name a folder (or hub name) of a model")
    return path


def softmax_size(ids: int, model: TokenStatsModel) -> int:
    """``ids``, checked against the rows of the model's head.

    Raises:
        ValueError: the head has fewer rows, so model and tokenizer do not belong together.
    """
    rows = model.causal_lm.get_output_embeddings().weight.shape[0]
    if ids > rows:
        raise ValueError(
            f"the tokenizer names {ids} ids and {model.causal_lm.name_or_path} has {rows} rows; "
            "check model.path and tokenizer_path, or resize the model's embeddings"
        )
    return ids

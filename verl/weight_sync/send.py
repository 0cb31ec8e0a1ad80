"""The trained weights, whole and in buckets, for rollout engines on the same machines.

In:  a sharded model. Out, per bucket: on the CPU a safetensors file in shared memory, on CUDA handles through which an
engine on the same GPU reads the tensors where they lie. Every rank calls `export` for every bucket, in order, because
each tensor is gathered from all of them. A bucket stays until it is released.

    export(0) ─► engines load ─► release(0) ─► export(1) ─► ...

Names are Hugging Face's; a tensor shared by embedding and head appears once, as the embedding.
Not here: telling the engines, checking what they loaded.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from verl.utils.device import dtype_name, get_device_uuid, release_cached_memory, synchronize
from verl.utils.owned_folders import OwnedFolder, make_owned_folder, remove_abandoned

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "kai-verl-weights-"

WeightInfo = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of one tensor, such as ("lm_head.weight", "float32", (640, 128))."""


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a `TokenStatsModel` under their Hugging Face names, each once."""
    return {name.removeprefix("causal_lm."): parameter for name, parameter in module.named_parameters()}


def gather_whole(parameter: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor on every rank. Shards are cast before they travel; a sharded one wants all ranks' call."""
    shard = parameter.detach().to(device=device, dtype=dtype)
    return shard.full_tensor() if isinstance(shard, DTensor) else shard


class Placement(NamedTuple):
    """Where a rank exports from."""

    device: torch.device
    is_node_writer: bool
    """One rank of each machine, which writes the files."""


class WeightExporter:
    """Gathers and lends the weights of one model, bucket by bucket.

    Args:
        module: the sharded `TokenStatsModel`.
        placement: this rank's device and duty.
        dtype: the engines' precision.
        bucket_bytes: most bytes of a bucket; a larger tensor is a bucket of its own.
    """

    def __init__(self, module: nn.Module, placement: Placement, dtype: torch.dtype, bucket_bytes: int) -> None:
        self._module = module
        self._placement = placement
        self._dtype = dtype
        self._buckets = _fill_buckets(named_weights(module), dtype.itemsize, bucket_bytes)
        self._release: dict[int, Callable[[], None]] = {}
        if placement.is_node_writer:
            remove_abandoned(SHARED_MEMORY, FOLDER_PREFIX)

    @property
    def num_buckets(self) -> int:
        """Buckets of one export."""
        return len(self._buckets)

    def metadata(self) -> list[WeightInfo]:
        """Every tensor that an export holds, in order."""
        weights = named_weights(self._module)
        names = [name for bucket in self._buckets for name in bucket]
        return [(name, dtype_name(self._dtype), tuple(weights[name].shape)) for name in names]

    def export(self, index: int) -> dict[str, Any] | None:
        """Gather a bucket and lend it; all ranks together.

        Returns:
            On CUDA, on every rank: ``names``, ``dtype_names``, ``shapes`` and ``ipc_handles``, per tensor that of
            this rank's GPU. On the CPU ``path`` and ``names`` on the writing rank of each machine, else None.
        """
        weights = named_weights(self._module)
        keeps = self._placement.device.type == "cuda" or self._placement.is_node_writer
        tensors: dict[str, torch.Tensor] = {}
        for name in self._buckets[index]:
            whole = gather_whole(weights[name], self._placement.device, self._dtype)
            if keeps:
                tensors[name] = whole.contiguous()
        if not keeps:
            return None
        return self._lend_handles(index, tensors) if whole.is_cuda else self._lend_file(index, tensors)

    def release(self, index: int) -> None:
        """Take a bucket back; nothing happens where it is not lent."""
        if index in self._release:
            self._release.pop(index)()

    def _lend_file(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        folder = _roomy_folder(sum(tensor.nbytes for tensor in tensors.values()))
        self._release[index] = folder.remove
        path = folder.path / f"bucket-{index}.safetensors"
        save_file(tensors, path)
        return {"path": str(path), "names": list(tensors)}

    def _lend_handles(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        # Every GPU has an engine beside it, so each rank holds the bucket; one on several GPUs reads several ranks'.
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = get_device_uuid("cuda")
        handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        synchronize("cuda")  # readers may start at once

        def release() -> None:
            tensors.clear()
            release_cached_memory("cuda")

        self._release[index] = release
        return {
            "names": list(tensors),
            "dtype_names": [dtype_name(tensor.dtype) for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "ipc_handles": handles,
        }


def _fill_buckets(weights: dict[str, nn.Parameter], itemsize: int, bucket_bytes: int) -> list[list[str]]:
    """Names in the model's order, as many to a bucket as fit."""
    buckets: list[list[str]] = []
    room = 0
    for name, parameter in weights.items():
        size = parameter.numel() * itemsize
        if not buckets or size > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(name)
        room -= size
    return buckets


def _roomy_folder(num_bytes: int) -> OwnedFolder:
    """A new folder only this user may read, in shared memory where that has room, else where temporary files go."""
    parent = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free > 1.1 * num_bytes:
            parent = SHARED_MEMORY
    if parent != SHARED_MEMORY:
        logger.warning("no room for %.0f MiB of weights in %s; a file on disk it is", num_bytes / 2**20, SHARED_MEMORY)
    return make_owned_folder(parent, FOLDER_PREFIX)

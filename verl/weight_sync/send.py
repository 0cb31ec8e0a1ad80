"""The sender: a training rank's share of a weight sync.

In:  a sharded model. Out, per bucket: on the CPU a safetensors file in shared memory, on CUDA handles through which an
engine on the same GPU reads the tensors where they lie. Every rank calls `export` for every bucket, in order, because
each tensor is gathered from all of them. A bucket stays until it is released.

Names are Hugging Face's; a tensor shared by embedding and head appears once, as the embedding.
Not here: the order of calls (`sync`), what an engine does with a bucket (`receive`).
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from verl.utils.device import dtype_name, get_device_uuid, release_cached_memory, synchronize
from verl.utils.owned_folders import OwnedFolder, make_owned_folder, remove_abandoned

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "kai-verl-weights-"


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a `TokenStatsModel` under their Hugging Face names, each once."""
    return {name.removeprefix("causal_lm."): parameter for name, parameter in module.named_parameters()}


class WeightExporter:
    """Gathers the weights of one model and shares them with engines on this machine, bucket by bucket.

    Args:
        module: the sharded `TokenStatsModel`.
        device: this rank's.
        writes_files: true on one rank of each machine, which writes the files (CPU).
        dtype: the engines' precision.
        bucket_bytes: most bytes of a bucket; a larger tensor is a bucket of its own.
    """

    def __init__(
        self, module: nn.Module, *, device: torch.device, writes_files: bool, dtype: torch.dtype, bucket_bytes: int
    ) -> None:
        self._module = module
        self._device = device
        self._writes_files = writes_files
        self._dtype = dtype
        self._buckets = _fill_buckets(named_weights(module), dtype.itemsize, bucket_bytes)
        self._release: dict[int, Callable[[], None]] = {}
        if writes_files:
            remove_abandoned(SHARED_MEMORY, FOLDER_PREFIX)

    @property
    def num_buckets(self) -> int:
        """Buckets of one export."""
        return len(self._buckets)

    def export(self, index: int) -> dict[str, Any] | None:
        """Gather a bucket and share it; all ranks together.

        Returns:
            On CUDA, on every rank: ``names``, ``dtype_names``, ``shapes`` and ``ipc_handles``, per tensor that of
            this rank's GPU. On the CPU ``path`` and ``names`` on the writing rank of each machine, else None.
        """
        weights = named_weights(self._module)
        on_gpu = self._device.type == "cuda"
        tensors: dict[str, torch.Tensor] = {}
        for name in self._buckets[index]:
            # Cast before it is gathered: less travels. Gathering needs every rank, those that keep nothing too.
            tensor = weights[name].detach().to(device=self._device, dtype=self._dtype)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if on_gpu or self._writes_files:
                tensors[name] = whole.contiguous()
        if on_gpu:
            return self._share_handles(index, tensors)
        return self._share_file(index, tensors) if self._writes_files else None

    def release(self, index: int) -> None:
        """Free a bucket; does nothing where it is not exported."""
        if index in self._release:
            self._release.pop(index)()

    def _share_file(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        folder = _make_folder(sum(tensor.nbytes for tensor in tensors.values()))
        self._release[index] = folder.remove
        path = folder.path / f"bucket-{index}.safetensors"
        save_file(tensors, path)
        return {"path": str(path), "names": list(tensors)}

    def _share_handles(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        # Every GPU has an engine beside it, so each rank keeps the bucket; one on several GPUs reads several ranks'.
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = get_device_uuid()
        bucket = {
            "names": list(tensors),
            "dtype_names": [dtype_name(tensor.dtype) for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()],
        }
        synchronize("cuda")  # engines may read at once

        def release() -> None:
            tensors.clear()
            release_cached_memory("cuda")

        self._release[index] = release
        return bucket


def _fill_buckets(weights: dict[str, nn.Parameter], itemsize: int, bucket_bytes: int) -> list[list[str]]:
    """Names in the model's order, as many to a bucket as fit."""
    buckets: list[list[str]] = []
    free_bytes = 0
    for name, parameter in weights.items():
        size = parameter.numel() * itemsize
        if not buckets or size > free_bytes:
            buckets.append([])
            free_bytes = bucket_bytes
        buckets[-1].append(name)
        free_bytes -= size
    return buckets


def _make_folder(num_bytes: int) -> OwnedFolder:
    """A new folder that only this user may read: in shared memory if the bucket fits, else among temporary files."""
    try:
        fits = shutil.disk_usage(SHARED_MEMORY).free > 1.1 * num_bytes
    except OSError:
        fits = False
    if fits:
        return make_owned_folder(SHARED_MEMORY, FOLDER_PREFIX)
    folder = make_owned_folder(Path(tempfile.gettempdir()), FOLDER_PREFIX)
    logger.warning("%s is too full for %.0f MiB of weights; using %s", SHARED_MEMORY, num_bytes / 2**20, folder.path)
    return folder

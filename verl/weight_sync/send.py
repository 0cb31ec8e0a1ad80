"""The sender: the driver's order of calls, and each training rank's share of a weight sync.

In:  the sharded student, the engines, and which ranks are beside each of them. Out: every engine has the new weights.

    all engines: start_weight_update
    per bucket:  all ranks export ─► all engines load what the ranks beside them exported ─► all ranks release
    all engines: finish_weight_update(version); each checks that the whole model came, and stamps its answers

A bucket is, on the CPU, a safetensors file in shared memory; on CUDA, handles through which an engine on the same GPU
reads the tensors where they lie. Every rank exports every bucket, in order, because each tensor is gathered from all of
them. Names are Hugging Face's; a tensor shared by embedding and head appears once, as the embedding.

Not here: what an engine does with a bucket (`receive`), and how calls are waited for (the caller).
"""

import logging
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from verl.utils.device import dtype_name, get_device_uuid, release_cached_memory, synchronize
from verl.utils.owned_folders import make_owned_folder, remove_abandoned

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "kai-verl-weights-"

Bucket = dict[str, Any]
"""Where to read one bucket; see `WeightExporter.export`."""


def send_weights(
    student: Any, engines: Sequence[Any], ranks_beside: Sequence[Sequence[int]], wait: Callable[..., Any], version: int
) -> None:
    """Send the student's weights to every engine.

    Args:
        student: the worker group; its lists have one entry per rank.
        engines: handles of rollout replicas; as with a Ray actor, ``engine.method.remote(...)`` starts a call.
        ranks_beside: per engine the ranks whose export it reads: on CUDA those on its GPUs, on CPU all of its node.
        wait: ``wait(task, calls)`` waits for calls that were started, one per engine; ``task`` is for its errors.
        version: number of these weights; engines stamp their answers with it.
    """
    wait("begin a weight sync", [engine.start_weight_update.remote() for engine in engines])
    for index in range(student.num_weight_buckets()):
        exports = student.export_weight_bucket(index)
        try:
            buckets = [bucket_for(ranks, exports) for ranks in ranks_beside]
            wait(
                f"load weight bucket {index} of version {version}",
                [engine.update_weights.remote(bucket) for engine, bucket in zip(engines, buckets, strict=True)],
            )
        finally:
            student.release_weight_bucket(index)
    calls = [engine.finish_weight_update.remote(version) for engine in engines]
    wait(f"finish the weight sync of version {version}", calls)


def bucket_for(ranks: Sequence[int], exports: Sequence[Bucket | None]) -> Bucket:
    """What the engine beside ``ranks`` reads one bucket from.

    A file in a node's shared memory serves as it is. Handles of GPU memory are joined, so that the engine gets those
    of its own GPUs: all ranks' handles for all engines would grow with the square of the cluster.
    """
    first, *others = [export for export in (exports[rank] for rank in ranks) if export is not None]
    if "ipc_handles" not in first:
        return first
    by_tensor = zip(first["ipc_handles"], *(export["ipc_handles"] for export in others), strict=True)
    return {**first, "ipc_handles": [dict(ChainMap(*of_tensor)) for of_tensor in by_tensor]}


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
        self._dtype = dtype
        # Every GPU has an engine beside it, so each rank keeps the bucket; one on several GPUs reads several ranks'.
        on_cpu = self._share_file if writes_files else None
        self._share = self._share_handles if device.type == "cuda" else on_cpu
        self._buckets = _fill_buckets(named_weights(module), dtype.itemsize, bucket_bytes)
        self.num_buckets = len(self._buckets)
        self._release: dict[int, Callable[[], None]] = {}
        if writes_files:
            remove_abandoned(SHARED_MEMORY, FOLDER_PREFIX)

    def export(self, index: int) -> Bucket | None:
        """Gather a bucket and share it; all ranks together.

        Returns:
            ``names`` and ``shapes``, with ``path`` on the writing rank of each machine (CPU; None on the others), or
            ``dtype_names`` and ``ipc_handles``, per tensor that of this rank's GPU, on every rank (CUDA).
        """
        weights = named_weights(self._module)
        tensors: dict[str, torch.Tensor] = {}
        for name in self._buckets[index]:
            # Cast before it is gathered: less travels. Gathering needs every rank, those that keep nothing too.
            tensor = weights[name].detach().to(device=self._device, dtype=self._dtype)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._share:
                tensors[name] = whole.contiguous()
        if self._share is None:
            return None
        shapes = [list(tensor.shape) for tensor in tensors.values()]
        return {"names": list(tensors), "shapes": shapes, **self._share(index, tensors)}

    def release(self, index: int) -> None:
        """Free a bucket; does nothing where it is not exported."""
        self._release.pop(index, lambda: None)()

    def _share_file(self, index: int, tensors: dict[str, torch.Tensor]) -> Bucket:
        """In a folder that only this user may read: in shared memory if it fits, else among temporary files."""
        num_bytes, parent = sum(tensor.nbytes for tensor in tensors.values()), SHARED_MEMORY
        if not parent.is_dir() or shutil.disk_usage(parent).free < 1.1 * num_bytes:
            parent = Path(tempfile.gettempdir())
            logger.warning("%s is too full for %.0f MiB of weights; using %s", SHARED_MEMORY, num_bytes / 2**20, parent)
        folder = make_owned_folder(parent, FOLDER_PREFIX)
        self._release[index] = folder.remove
        path = str(folder.path / f"bucket-{index}.safetensors")
        save_file(tensors, path)
        return {"path": path}

    def _share_handles(self, index: int, tensors: dict[str, torch.Tensor]) -> Bucket:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = get_device_uuid()
        handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        synchronize("cuda")  # engines may read at once

        def release() -> None:
            tensors.clear()
            release_cached_memory("cuda")

        self._release[index] = release
        return {"dtype_names": [dtype_name(self._dtype)] * len(tensors), "ipc_handles": handles}


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

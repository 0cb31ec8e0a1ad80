"""One bucket of a weight sync on the engine's side: what is in it, whether it fits the model, how to read it.

In:  an ``update_info`` of the training workers: ``path`` and ``names`` of a safetensors file in shared memory (CPU), or
     ``names``, ``dtype_names``, ``shapes`` and ``ipc_handles`` of tensors in GPU memory (CUDA).
Out: names and shapes, the tensors themselves, and at the end of a sync the list of what was wrong.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

from verl.workers.rollout.model_facts import WeightManifest

LISTED_TENSORS = 20
"""Most names that one problem lists."""


def bucket_shapes(update_info: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a bucket's tensors; of a file its header alone is read."""
    if "path" not in update_info:
        return [(name, tuple(shape)) for name, shape in zip(update_info["names"], update_info["shapes"], strict=True)]
    with safe_open(update_info["path"], framework="pt") as bucket:
        return [(name, tuple(bucket.get_slice(name).get_shape())) for name in update_info["names"]]


def bucket_tensors(update_info: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, one at a time, views of the memory that the training workers own."""
    if "path" in update_info:
        with safe_open(update_info["path"], framework="pt") as bucket:
            for name in update_info["names"]:
                yield name, bucket.get_tensor(name)
        return
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for name, handles in zip(update_info["names"], update_info["ipc_handles"], strict=True):
        arguments = list(handles[uuid])
        # The sender's number of the GPU, which another process may count differently.
        arguments[6] = device.index
        yield name, rebuild_cuda_tensor(*arguments)


class ReceivedWeights:
    """What one sync has brought so far, held against the model's manifest."""

    def __init__(self, manifest: WeightManifest) -> None:
        self._manifest = manifest
        self._received: set[str] = set()
        self._unknown: list[str] = []
        self._reshaped: list[str] = []
        self._repeated: list[str] = []

    def receive(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> bool:
        """Note a bucket's names and shapes; False where one does not fit, and the bucket must not be loaded."""
        problems_before = self._count()
        for name, shape in tensors:
            expected = self._manifest.shapes.get(name)
            if expected is None:
                self._unknown.append(name)
            elif expected != shape:
                self._reshaped.append(f"{name} {list(shape)} instead of {list(expected)}")
            elif name in self._received:
                self._repeated.append(name)
            self._received.add(name)
        return self._count() == problems_before

    def problems(self) -> list[str]:
        """One line for each kind of mismatch at the end of a sync; empty if all is well."""
        missing = self._manifest.shapes.keys() - self._manifest.aliases - self._received
        kinds = {"missing": sorted(missing), "unknown": self._unknown, "reshaped": self._reshaped}
        kinds["sent twice"] = self._repeated
        return [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]

    def _count(self) -> int:
        return len(self._unknown) + len(self._reshaped) + len(self._repeated)


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED_TENSORS
    return ", ".join(names[:LISTED_TENSORS]) + (f" and {rest} more" if rest > 0 else "")

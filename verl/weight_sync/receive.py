"""The receiver: what an engine does with the buckets of a weight sync.

In:  an ``update_info`` that a training rank made (`send`): ``names`` and ``shapes`` of the tensors, and where they are:
     ``path`` of a safetensors file in shared memory (CPU), or ``dtype_names`` and ``ipc_handles`` (CUDA).
Out: the tensors, and at the end of a sync the list of what did not match the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

WeightShapes = Mapping[str, tuple[int, ...]]
"""Name (Hugging Face's) and shape of every tensor of a model; one that is shared, such as a tied head, once."""


def weight_shapes(model: torch.nn.Module) -> WeightShapes:
    """What a sync has to bring for this model."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def bucket_tensors(update_info: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, one at a time, views of memory that belongs to the training ranks.

    A file is mapped, not read; it may be unlinked once all of them are used.
    """
    if "path" in update_info:
        with safe_open(update_info["path"], framework="pt") as bucket:
            yield from ((name, bucket.get_tensor(name)) for name in update_info["names"])
        return
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for name, handles in zip(update_info["names"], update_info["ipc_handles"], strict=True):
        arguments = list(handles[uuid])
        # The sender's number of the GPU, which another process may count differently.
        arguments[6] = device.index
        yield name, rebuild_cuda_tensor(*arguments)


class ReceivedWeights:
    """What one sync has brought so far, compared with what the model needs."""

    def __init__(self, expected: WeightShapes) -> None:
        self._expected = expected
        self._received: set[str] = set()
        self._problems: list[str] = []

    def add(self, update_info: Mapping[str, Any]) -> bool:
        """Record a bucket; False if one of its tensors does not fit the model: the bucket must not be loaded."""
        before = len(self._problems)
        for name, shape in zip(update_info["names"], update_info["shapes"], strict=True):
            expected = self._expected.get(name)
            if expected is None:
                self._problems.append(f"unknown: {name}")
            elif expected != tuple(shape):
                self._problems.append(f"reshaped: {name} {list(shape)} instead of {list(expected)}")
            elif name in self._received:
                self._problems.append(f"sent twice: {name}")
            self._received.add(name)
        return len(self._problems) == before

    def problems(self) -> list[str]:
        """Every mismatch, at the end of a sync; empty if the model is complete."""
        missing = self._expected.keys() - self._received
        return [*(f"missing: {name}" for name in sorted(missing)), *self._problems]

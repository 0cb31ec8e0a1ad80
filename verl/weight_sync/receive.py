"""The receiver: what an engine does with the buckets of a weight sync.

In:  an ``update_info`` that a training rank made (`send`): ``path`` and ``names`` of a safetensors file in shared
     memory (CPU), or ``names``, ``dtype_names``, ``shapes`` and ``ipc_handles`` of tensors in GPU memory (CUDA).
Out: the tensors, and at the end of a sync the list of what did not match the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

LISTED_TENSORS = 20
"""Most names that one problem lists."""


class WeightShapes(NamedTuple):
    """Names (Hugging Face's) and shapes of a model's weights."""

    shapes: dict[str, tuple[int, ...]]
    """Every tensor, second names of shared tensors included."""
    aliases: frozenset[str]
    """Second names of shared tensors, such as a tied ``lm_head.weight``: a sync may bring them or not."""


def weight_shapes(model: torch.nn.Module) -> WeightShapes:
    """Names and shapes of a model's parameters."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    return WeightShapes(shapes, frozenset(shapes.keys() - dict(model.named_parameters()).keys()))


def bucket_shapes(update_info: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a bucket's tensors; of a file its header alone is read."""
    if "path" not in update_info:
        return [(name, tuple(shape)) for name, shape in zip(update_info["names"], update_info["shapes"], strict=True)]
    with safe_open(update_info["path"], framework="pt") as bucket:
        return [(name, tuple(bucket.get_slice(name).get_shape())) for name in update_info["names"]]


def file_tensors(path: str, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket's file, one at a time. It is mapped, not read, and may be unlinked once all are used."""
    with safe_open(path, framework="pt") as bucket:
        for name in names:
            yield name, bucket.get_tensor(name)


def bucket_tensors(update_info: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, one at a time, views of memory that belongs to the training ranks."""
    if "path" in update_info:
        yield from file_tensors(update_info["path"], update_info["names"])
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
        self._problems: dict[str, list[str]] = {"unknown": [], "reshaped": [], "sent twice": []}

    def add(self, update_info: Mapping[str, Any]) -> bool:
        """Record a bucket; False if one of its tensors does not fit the model: the bucket must not be loaded."""
        before = sum(map(len, self._problems.values()))
        for name, shape in bucket_shapes(update_info):
            expected = self._expected.shapes.get(name)
            if expected is None:
                self._problems["unknown"].append(name)
            elif expected != shape:
                self._problems["reshaped"].append(f"{name} {list(shape)} instead of {list(expected)}")
            elif name in self._received:
                self._problems["sent twice"].append(name)
            self._received.add(name)
        return sum(map(len, self._problems.values())) == before

    def problems(self) -> list[str]:
        """One line per kind of mismatch, at the end of a sync; empty if the model is complete."""
        missing = self._expected.shapes.keys() - self._expected.aliases - self._received
        lines = []
        for kind, names in {"missing": sorted(missing), **self._problems}.items():
            rest = len(names) - LISTED_TENSORS
            if names:
                lines.append(f"{kind}: {', '.join(names[:LISTED_TENSORS])}" + (f" and {rest} more" if rest > 0 else ""))
        return lines

"""Write a safetensors file one tensor at a time, so that no more than one has to be in memory.

In: names, dtypes and shapes, and a function that gives the tensor of a name. Out: a file as the ``safetensors``
library reads it: eight bytes with the length of a JSON header, the header, the tensors end to end
(https://huggingface.co/docs/safetensors).
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class TensorInfo(NamedTuple):
    """A tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, infos: Sequence[TensorInfo], read: Callable[[TensorInfo], torch.Tensor]) -> None:
    """Write the tensors in the given order; when this returns, the file is on the disk.

    Args:
        infos: what the file will hold.
        read: the tensor of an entry, on the CPU, with that entry's dtype and shape.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as stream:
        stream.write(_header(infos))
        for info in infos:
            tensor = read(info).contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), f"{info} became another tensor"
            values: Any = tensor.flatten().view(torch.uint8).numpy()  # a buffer, which numpy's types do not say
            stream.write(values)
        stream.flush()
        os.fsync(stream.fileno())


def _header(infos: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        start, end = end, end + info.num_bytes
        entries[info.name] = {"dtype": _DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

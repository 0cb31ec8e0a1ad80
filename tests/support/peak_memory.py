"""What an operation allocates at most."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """The most bytes that the tensors made within the block held at once; of sharded ones this rank's part."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = getattr(value, "_local_tensor", value).untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage)
        self._made = {key: reference for key, reference in self._made.items() if not reference.expired()}
        # FSDP frees the storage of a gathered parameter, and keeps the tensor: hence its size now.
        storages = [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self._made.values()]
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in storages if storage.device.type != "meta"))
        return result

"""What an operation allocates at most."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """The most bytes that the tensors made within the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        made = [*self._made, *(weakref.ref(value) for value in leaves if isinstance(value, torch.Tensor))]
        alive = [(reference, tensor) for reference in made if (tensor := reference()) is not None]
        self._made = [reference for reference, _ in alive]
        storages = [tensor.untyped_storage() for _, tensor in alive]
        self.bytes = max(self.bytes, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return result

"""Ray's object store for workers: a value stays in the memory of its node until another node fetches it."""

from collections.abc import Sequence
from typing import Any

import ray


class RayObjectStore:
    """Handles are object references, which Ray counts; the value goes when the last of them has gone."""

    def lend(self, value: Any) -> ray.ObjectRef:
        """See `verl.single_controller.base.object_store.ObjectStore`."""
        return ray.put(value)

    def fetch(self, handles: Sequence[ray.ObjectRef]) -> list[Any]:
        """See `verl.single_controller.base.object_store.ObjectStore`."""
        return ray.get(list(handles))

"""Loans through Ray's object store: a value lies in the memory of the lender's node, and goes from node to node."""

from collections.abc import Sequence
from typing import Any

import ray


class RayLoans:
    """Handles are object references, which Ray counts; the value goes when the last of them has gone."""

    def lend(self, value: Any) -> ray.ObjectRef:
        """See `verl.single_controller.base.loans.Loans`."""
        return ray.put(value)

    def fetch(self, handles: Sequence[ray.ObjectRef]) -> list[Any]:
        """See `verl.single_controller.base.loans.Loans`."""
        return ray.get(list(handles))

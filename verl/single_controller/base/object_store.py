"""Values that are too large for the driver: they stay where they were made, and whoever needs them fetches them there.

::

    rank that lends ── handle ──► driver ── handle ──► rank that fetches
          └──────────────────── the value ───────────────────┘

A value lives as long as a handle to it does, wherever that is. A handle may travel in a batch, as any Python object.
"""

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol


class ObjectStore(Protocol):
    """How a worker lends and fetches values."""

    def lend(self, value: Any) -> Any:
        """A small handle to a value, which nobody may change from now on."""

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """The values of handles, wherever these were made; waits for them."""


class InProcessHandle:
    """The value itself, for workers that share a process; it goes nowhere else."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> NoReturn:
        raise TypeError("this value was lent within one process; workers on Ray lend across processes")


class InProcessObjectStore:
    """Lender and borrower share a process."""

    def lend(self, value: Any) -> InProcessHandle:
        """See `ObjectStore`."""
        return InProcessHandle(value)

    def fetch(self, handles: Sequence[InProcessHandle]) -> list[Any]:
        """See `ObjectStore`."""
        return [handle.value for handle in handles]

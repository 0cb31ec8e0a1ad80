"""What a rank says of the checkpoint it writes; the driver reads it."""

from typing import NamedTuple


class SaveOutcome(NamedTuple):
    """How far one rank's part of a checkpoint is."""

    done: bool
    """False while the rank still writes."""
    error: str = ""
    """Why nothing usable was written; empty where all went well, and while the rank writes."""
    seconds: float = 0.0
    """From the start of the copy to the last byte, where all went well."""

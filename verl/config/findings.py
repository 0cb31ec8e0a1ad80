"""What a check of a run finds."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What the checks found."""

    errors: list[str] = field(default_factory=list)
    """Reasons why the run cannot start."""
    notices: list[str] = field(default_factory=list)
    """What the user should know and may have meant."""

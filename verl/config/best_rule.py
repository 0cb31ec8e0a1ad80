"""The rule of ``trainer.best_metric``: which validation is the best one.

::

    NAME [max|min] [subject to NAME >= X [of step 0] [and NAME <= X [of step 0]] ...]

    val/general/reward
    val/reverse_kl min
    val/general_*/reward subject to val/rec_*/reward >= 0.98 of step 0 and val/general_*/extend_seq_ratio <= 0.01

``max`` is the default. NAME is a figure of validation, or a shell pattern (``*``, ``?``) that stands for the mean of
all figures it matches. ``X of step 0`` is X times what the figure was before training.

In: the text, and the figures of validations by name. Out: a value, what is not met, in words. Knows no files.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

KEY = "trainer.best_metric"
FORM = "NAME [max|min] [subject to NAME >= X [of step 0] [and ...]]"
_OBJECTIVE = re.compile(r"(?P<name>[^\s<>=]+)(?:\s+(?P<direction>\S+))?")
_CONSTRAINT = re.compile(r"(?P<name>[^\s<>=]+)\s*(?P<sign>>=|<=)\s*(?P<bound>[^\s]+)(?P<start>\s+of\s+step\s+0)?")

Figures = Mapping[str, float]


def figure(figures: Figures, name: str) -> float | None:
    """A figure, or the mean of those that a pattern matches; None where there is none."""
    if name in figures:
        return figures[name]
    matching = [value for known, value in figures.items() if fnmatchcase(known, name)]
    return sum(matching) / len(matching) if matching else None


@dataclass(frozen=True)
class Constraint:
    """A bound that a step has to keep."""

    name: str
    at_least: bool
    bound: float
    of_start: bool
    """Whether the bound is a multiple of what the figure was at step 0."""

    def bound_for(self, start: Figures) -> float:
        """The bound as a number; NaN, which nothing keeps, where step 0 lacks the figure."""
        if not self.of_start:
            return self.bound
        before = figure(start, self.name)
        return math.nan if before is None else self.bound * before

    def is_met(self, figures: Figures, start: Figures) -> bool:
        """Whether a step keeps it; a figure that is missing or NaN does not."""
        value, bound = figure(figures, self.name), self.bound_for(start)
        return value is not None and (value >= bound if self.at_least else value <= bound)

    def told(self, figures: Figures, start: Figures) -> str:
        """The figure and its bound, in words."""
        value, sign = figure(figures, self.name), ">=" if self.at_least else "<="
        bound = f"{self.bound_for(start):.4g}" + (f" = {self.bound:g} of step 0" if self.of_start else "")
        return f"{self.name} {'missing' if value is None else f'{value:.4g}'}, bound {sign} {bound}"


@dataclass(frozen=True)
class BestRule:
    """What makes a validation better than another."""

    text: str
    name: str
    maximise: bool
    constraints: tuple[Constraint, ...]

    @classmethod
    def parse(cls, text: str) -> "BestRule":
        """Read a rule.

        Raises:
            ValueError: it is none; the message names the part that is not understood.
        """
        objective, *rest = re.split(r"\s+subject\s+to\s+", text.strip(), maxsplit=1)
        match = _OBJECTIVE.fullmatch(objective)
        if match is None or (match["direction"] or "max") not in ("max", "min"):
            raise _not_understood(text, objective, "the name of a figure, then max, min or nothing")
        parts = re.split(r"\s+and\s+", rest[0]) if rest else []
        constraints = tuple(_constraint(text, part.strip()) for part in parts)
        return cls(text.strip(), match["name"], match["direction"] != "min", constraints)

    @property
    def names(self) -> list[str]:
        """Figures and patterns that it reads."""
        return [self.name, *(constraint.name for constraint in self.constraints)]

    @property
    def names_of_start(self) -> list[str]:
        """Those of them whose value at step 0 it needs."""
        return [constraint.name for constraint in self.constraints if constraint.of_start]

    def require_known(self, figures: Figures) -> None:
        """Raise ValueError where a name stands for no figure of a validation, with all that there are."""
        unknown = [name for name in self.names if figure(figures, name) is None]
        if unknown:
            raise ValueError(
                f"{KEY}={self.text!r} names {', '.join(unknown)}, which validation does not give; it gives "
                f"{', '.join(sorted(figures)) or 'nothing'}"
            )

    def qualifies(self, figures: Figures, start: Figures) -> bool:
        """Whether a step has the figure and keeps all bounds."""
        value = figure(figures, self.name)
        return value is not None and math.isfinite(value) and all(c.is_met(figures, start) for c in self.constraints)

    def value(self, figures: Figures) -> float:
        """The figure that decides; raises ValueError where it is missing."""
        found = figure(figures, self.name)
        if found is None:
            raise ValueError(f"{KEY}: {self.name} is missing in {sorted(figures)}")
        return found

    def is_better(self, figures: Figures, than: Figures) -> bool:
        """Whether a step is strictly better than another; of equals the first stays."""
        mine, other = self.value(figures), self.value(than)
        return mine > other if self.maximise else mine < other

    def told(self, figures: Figures, start: Figures) -> str:
        """The figures of a step that the rule looks at, in words."""
        return "; ".join(
            [f"{self.name} {self.value(figures):.4g}", *(c.told(figures, start) for c in self.constraints)]
        )


def _constraint(text: str, part: str) -> Constraint:
    match = _CONSTRAINT.fullmatch(part)
    if match is None:
        raise _not_understood(text, part, "NAME >= X, NAME <= X, or one of these with 'of step 0' behind it")
    try:
        bound = float(match["bound"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise _not_understood(text, match["bound"], "a number")
    return Constraint(match["name"], match["sign"] == ">=", bound, match["start"] is not None)


def _not_understood(text: str, part: str, wanted: str) -> ValueError:
    return ValueError(f"{KEY}={text!r}: {part!r} should be {wanted}; the form is {FORM}")

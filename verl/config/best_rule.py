"""The rule of ``trainer.best_metric``: which validation is the best one.

::

    NAME [max|min] [subject to NAME >= X [of step 0] [and NAME <= X [of step 0]] ...]

    val/general/reward
    val/reverse_kl min
    val/general_*/reward subject to val/rec_*/reward >= 0.98 of step 0 and val/general_*/extend_seq_ratio <= 0.01

``max`` is the default. NAME is a metric of validation, or a shell pattern (``*``, ``?``) that stands for the mean of
all metrics it matches. ``X of step 0`` is X times the metric before training.

In: the text, and the metrics of validations by name. Out: values, comparisons, descriptions. Reads no files.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

KEY = "trainer.best_metric"
FORM = "NAME [max|min] [subject to NAME >= X [of step 0] [and ...]]"
_OBJECTIVE = re.compile(r"(?P<name>[^\s<>=]+)(?:\s+(?P<direction>max|min))?")
_CONSTRAINT = re.compile(r"(?P<name>[^\s<>=]+)\s*(?P<sign>>=|<=)\s*(?P<bound>[^\s]+)(?P<start>\s+of\s+step\s+0)?")

Metrics = Mapping[str, float]


def metric_value(metrics: Metrics, name: str) -> float | None:
    """A metric, or the mean of those that a pattern matches; None where there is none."""
    if name in metrics:
        return metrics[name]
    matching = [value for known, value in metrics.items() if fnmatchcase(known, name)]
    return sum(matching) / len(matching) if matching else None


@dataclass(frozen=True)
class Constraint:
    """A bound that a step has to keep."""

    name: str
    at_least: bool
    bound: float
    of_start: bool
    """Whether the bound is a multiple of the metric at step 0."""

    def bound_for(self, start: Metrics) -> float:
        """The bound as a number; NaN, which no value keeps, where step 0 lacks the metric."""
        if not self.of_start:
            return self.bound
        before = metric_value(start, self.name)
        return math.nan if before is None else self.bound * before

    def is_met(self, metrics: Metrics, start: Metrics) -> bool:
        """Whether a step keeps the bound; with a metric that is missing or NaN it does not."""
        value, bound = metric_value(metrics, self.name), self.bound_for(start)
        return value is not None and (value >= bound if self.at_least else value <= bound)

    def describe(self, metrics: Metrics, start: Metrics) -> str:
        """The metric and its bound as text."""
        value, sign = metric_value(metrics, self.name), ">=" if self.at_least else "<="
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
            ValueError: a part of it is not understood; the message names it.
        """
        objective, *rest = re.split(r"\s+subject\s+to\s+", text.strip(), maxsplit=1)
        match = _OBJECTIVE.fullmatch(objective)
        if match is None:
            raise _not_understood(text, objective, "the name of a metric, then max, min or nothing")
        parts = re.split(r"\s+and\s+", rest[0]) if rest else []
        constraints = tuple(_parse_constraint(text, part.strip()) for part in parts)
        return cls(text.strip(), match["name"], match["direction"] != "min", constraints)

    @property
    def names(self) -> list[str]:
        """Metrics and patterns that the rule reads."""
        return [self.name, *(constraint.name for constraint in self.constraints)]

    @property
    def names_of_start(self) -> list[str]:
        """Those of them whose value at step 0 the rule needs."""
        return [constraint.name for constraint in self.constraints if constraint.of_start]

    def require_known(self, metrics: Metrics) -> None:
        """Raise ValueError where a name stands for no metric of a validation, with all that there are."""
        unknown = [name for name in self.names if metric_value(metrics, name) is None]
        if unknown:
            raise ValueError(
                f"{KEY}={self.text!r} names {', '.join(unknown)}, which validation does not give; it gives "
                f"{', '.join(sorted(metrics)) or 'nothing'}"
            )

    def qualifies(self, metrics: Metrics, start: Metrics) -> bool:
        """Whether a step has the metric and keeps all bounds."""
        value = metric_value(metrics, self.name)
        return value is not None and math.isfinite(value) and all(c.is_met(metrics, start) for c in self.constraints)

    def value(self, metrics: Metrics) -> float:
        """The metric that decides; raises ValueError where it is missing."""
        found = metric_value(metrics, self.name)
        if found is None:
            raise ValueError(f"{KEY}: {self.name} is missing in {sorted(metrics)}")
        return found

    def is_better(self, metrics: Metrics, than: Metrics) -> bool:
        """Whether a step is strictly better than another; of equals the first stays."""
        mine, other = self.value(metrics), self.value(than)
        return mine > other if self.maximise else mine < other

    def describe(self, metrics: Metrics, start: Metrics) -> str:
        """The metrics of a step that the rule reads, with their bounds, as text."""
        decides = f"{self.name} {self.value(metrics):.4g}"
        return "; ".join([decides, *(constraint.describe(metrics, start) for constraint in self.constraints)])


def _parse_constraint(text: str, part: str) -> Constraint:
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

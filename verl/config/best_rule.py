"""The rule of ``trainer.best_metric``: which validation is the best one; and bounds alone, of ``trainer.keep``.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

KEY = "trainer.best_metric"
FORM = "NAME [max|min] [subject to NAME >= X [of step 0] [and ...]]"
KEEP_FORM = "NAME >= X [of step 0] [by GROUP]"
_OBJECTIVE = re.compile(r"(?P<name>[^\s<>=]+)(?:\s+(?P<direction>max|min))?")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BOUND = re.compile(rf"(?P<name>[^\s<>=]+)\s*(?P<sign>>=|<=)\s*(?P<factor>{_NUMBER})(?P<start>\s+of\s+step\s+0)?")

Metrics = Mapping[str, float]


class MetricRuleError(ValueError):
    """A rule or a bound does not fit the metrics that validation gives."""


def matching_values(metrics: Metrics, name: str) -> list[float]:
    """The metric of a name, or those that a pattern matches."""
    # A metric of that very name comes first: names of sources may hold characters of a pattern.
    return [metrics[name]] if name in metrics else [v for known, v in metrics.items() if fnmatchcase(known, name)]


def metric_value(metrics: Metrics, name: str) -> float:
    """A metric, or the mean of those that a pattern matches; NaN where there is none."""
    values = matching_values(metrics, name)
    return sum(values) / len(values) if values else math.nan


def require_known(setting: str, names: Iterable[str], metrics: Metrics) -> None:
    """Raise MetricRuleError where a name stands for no metric of a validation."""
    if unknown := [name for name in names if not matching_values(metrics, name)]:
        raise MetricRuleError(
            f"{setting} names {', '.join(unknown)}, which validation does not give; it gives "
            f"{', '.join(sorted(metrics)) or 'nothing'}"
        )


@dataclass(frozen=True)
class Bound:
    """A bound that a step has to keep; none keeps one that is NaN."""

    name: str
    sign: str
    """``>=`` or ``<=``."""
    factor: float
    of_start: bool
    """Whether the bound is ``factor`` times the metric at step 0, and not ``factor`` itself."""

    def value(self, start: Metrics) -> float:
        """The bound as a number."""
        return self.factor * metric_value(start, self.name) if self.of_start else self.factor

    def violation(self, metrics: Metrics, start: Metrics) -> float:
        """By how much a step misses the bound, as a share of it; negative where it keeps it, NaN without the metric."""
        bound = self.value(start)
        missing = bound - metric_value(metrics, self.name)
        return (missing if self.sign == ">=" else -missing) / (abs(bound) or 1.0)

    def describe(self, metrics: Metrics, start: Metrics) -> str:
        """The metric and its bound as text."""
        origin = f" = {self.factor:g} of step 0" if self.of_start else ""
        return f"{self.name} {metric_value(metrics, self.name):.4g}, bound {self.sign} {self.value(start):.4g}{origin}"


def _bound_of(match: re.Match[str]) -> Bound:
    return Bound(match["name"], match["sign"], float(match["factor"]), match["start"] is not None)


def parse_kept(text: str) -> tuple[str, Bound, str]:
    """A bound of ``trainer.keep``: the text, the bound, and the group of ``data.source_weights`` whose share keeps it.

    Without ``by`` the group is what stands between ``val/`` and the metric's own name.

    Raises:
        ValueError: it is not understood.
    """
    words, _, group = text.partition(" by ")
    match = _BOUND.fullmatch(words.strip())
    if match is None:
        raise ValueError(f"trainer.keep={text!r} is not understood; the form is {KEEP_FORM}")
    return text, _bound_of(match), group.strip() or match["name"].partition("/")[2].rpartition("/")[0]


@dataclass(frozen=True)
class BestRule:
    """What makes a validation better than another."""

    text: str
    name: str
    maximise: bool
    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> "BestRule":
        """Read a rule.

        Raises:
            ValueError: a part of it is not understood; the message names it.
        """
        objective, *rest = re.split(r"\s+subject\s+to\s+", text.strip(), maxsplit=1)
        parts = [objective, *(re.split(r"\s+and\s+", rest[0]) if rest else [])]
        matches = [_OBJECTIVE.fullmatch(objective), *map(_BOUND.fullmatch, parts[1:])]
        for part, match in zip(parts, matches, strict=True):
            if match is None:
                raise ValueError(f"{KEY}={text!r}: {part!r} is not understood; the form is {FORM}")
        first, *others = (match for match in matches if match)
        bounds = tuple(map(_bound_of, others))
        return cls(text.strip(), first["name"], first["direction"] != "min", bounds)

    @property
    def names(self) -> list[str]:
        """Metrics and patterns that the rule reads."""
        return [self.name, *(bound.name for bound in self.bounds)]

    @property
    def names_of_start(self) -> list[str]:
        """Those of them whose value at step 0 the rule needs."""
        return [bound.name for bound in self.bounds if bound.of_start]

    def value(self, metrics: Metrics) -> float:
        """The metric that decides."""
        return metric_value(metrics, self.name)

    def qualifies(self, metrics: Metrics, start: Metrics) -> bool:
        """Whether a step has the metric and keeps all bounds."""
        return math.isfinite(self.value(metrics)) and all(bound.violation(metrics, start) <= 0 for bound in self.bounds)

    def is_better(self, metrics: Metrics, than: Metrics) -> bool:
        """Whether a step is strictly better than another; of equals the first stays."""
        mine, other = self.value(metrics), self.value(than)
        return mine > other if self.maximise else mine < other

    def describe(self, metrics: Metrics, start: Metrics) -> str:
        """The metrics of a step that the rule reads, with their bounds, as text."""
        decides = f"{self.name} {self.value(metrics):.4g}"
        return "; ".join([decides, *(bound.describe(metrics, start) for bound in self.bounds)])

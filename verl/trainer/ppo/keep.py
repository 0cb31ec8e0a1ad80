"""Keeps metrics of validation within bounds by moving the shares of sources in the batches (``trainer.keep``).

::

    validation ─► violation, as a share of the bound ─► lambda of the group ─► its share from the next step on
        ▲                                                                          │
        └───────────────── the model, some steps later ◄───────────────────────────┘

A group of ``data.source_weights`` that a bound steers has a dual variable, ``lambda <- clip(lambda + rate x
violation)``: 0 is the lowest share, and lambda adds to the log-odds of the share against the groups that are free. It
falls while the bound is kept with room to spare, until it is just kept. The share follows ``lambda + rate x
violation``, for a model answers late, and lambda alone would overshoot. Each time a violation changes sign the rate
falls, to a fifth at last: the bound is about met then, and most of what is seen is noise.

In: metrics of validations. Out: shares of a ``Mixture``, metrics. Not here: rows (``trainer.data``), how a bound is
written (``config.best_rule``).
"""

import math
from collections.abc import Mapping
from typing import Any

from verl.config import PPOConfig
from verl.config.best_rule import Bound, MetricRuleError, Metrics, matching_values, metric_value, require_known
from verl.trainer.data import Mixture
from verl.utils.dataset.rl_dataset import RLHFDataset

LOWEST, HIGHEST = math.log(0.01 / 0.99), math.log(0.9 / 0.1)
"""Log-odds of shares, within which they are held from the first move on."""
LARGEST = 0.1
"""Violation that counts at most, so that no single validation moves a share far."""
CALMER, CALMEST = 0.7, 0.2
"""Factor on a rate at each change of sign, and the smallest factor that all changes together make."""


class MixtureControl:
    """The steered shares of a run; does nothing where ``trainer.keep`` is empty, or nothing is trained.

    Args:
        mixture: of the training prompts; None where sources have no shares, and then nothing is steered.
        val_dataset: validation prompts; None where there are none.
        state: of the driver in the checkpoint that the run goes on from; empty: it starts.

    Raises:
        ValueError: no validation prompt has a source that a bound on ``val/<source>/...`` names, or a bound compares
            with step 0, of which the checkpoint knows nothing.
    """

    def __init__(
        self, config: PPOConfig, mixture: Mixture | None, val_dataset: RLHFDataset | None, state: Mapping[str, Any]
    ) -> None:
        self._mixture, self._rate, weights = mixture, config.trainer.keep_rate, config.data.source_weights
        self._setting, self._bounds = f"trainer.keep={config.trainer.keep}", dict[str, list[Bound]]()
        saved = state.get("keep") or {"start": {}, "duals": {}}
        self._start: dict[str, float] = saved["start"]
        """The bounded metrics at the first validation."""
        for text, bound, group in [] if config.trainer.val_only else config.trainer.kept:
            self._bounds.setdefault(group, []).append(bound)
            if bound.of_start and state and bound.name not in self._start:
                fix = "give the bound as a number, or set trainer.resume_mode=disable"
                raise ValueError(f"trainer.keep={text!r}: the checkpoint has no metrics of step 0 for it; {fix}")
            if bound.name.startswith("val/") and bound.name.count("/") > 1 and val_dataset is not None:
                names = {f"val/{source}/{bound.name.rpartition('/')[2]}": 0.0 for source in val_dataset.sources}
                if not matching_values(names, bound.name):
                    raise ValueError(f"trainer.keep={text!r} names no metric of data.val_files: {', '.join(names)}")
        free = sum(weight for group, weight in weights.items() if group not in self._bounds)
        self._odds = {group: weight / free for group, weight in weights.items()} if self._bounds else {}
        """Odds of each group's weight against all free groups together; of a steered group, those at the start."""
        self._duals: dict[str, dict[str, float]] = {
            group: {"lambda": math.log(self._odds[group]) - LOWEST, "calm": 1.0, "last": 0.0}
            | saved["duals"].get(group, {})
            for group in self._bounds
        }
        """For each steered group: lambda, the factor on its rate, and the last violation that was not 0."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike."""
        return {"start": self._start, "duals": self._duals}

    def note(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Take a validation, and set the shares of the steps after it; returns what was done as metrics.

        Raises:
            MetricRuleError: a bound is on a metric that the run's first validation does not give, or on a part of 0.
        """
        if self._mixture is None or not self._bounds:
            return {}
        if not self._start:
            every = [bound for bounds in self._bounds.values() for bound in bounds]
            require_known(self._setting, [bound.name for bound in every], metrics)
            self._start = {bound.name: metric_value(metrics, bound.name) for bound in every}
            if zero := [bound.name for bound in every if bound.of_start and not self._start[bound.name]]:
                fix = "give the bound as a number"
                raise MetricRuleError(f"{self._setting}: {zero} is 0 at step 0, as is every part of it; {fix}")
        logged, odds = dict[str, float](), dict(self._odds)
        for group, bounds in self._bounds.items():
            found = [bound.violation(metrics, self._start) for bound in bounds]
            violation, dual = max((value for value in found if math.isfinite(value)), default=0.0), self._duals[group]
            if step > 0:
                odds[group] = math.exp(LOWEST + self._move(dual, violation))
            logged |= {f"keep/{group}/violation": violation, f"keep/{group}/lambda": dual["lambda"]}
        for group, value in odds.items():
            self._mixture.state[group]["share"] = value / sum(odds.values())
        return logged | {f"keep/{group}/share": self._mixture.shares[group] for group in self._bounds}

    def _move(self, dual: dict[str, float], violation: float) -> float:
        """Move lambda; returns the log-odds of the share above the lowest."""
        counted = max(-LARGEST, min(LARGEST, violation))
        if counted * dual["last"] < 0:
            dual["calm"] = max(dual["calm"] * CALMER, CALMEST)
        dual["last"] = counted or dual["last"]
        change, most = self._rate * dual["calm"] * counted, HIGHEST - LOWEST
        dual["lambda"] = max(0.0, min(most, dual["lambda"] + change))
        return max(0.0, min(most, dual["lambda"] + change))

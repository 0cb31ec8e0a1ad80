"""The controller of the mixture (``trainer.keep``): where it ends, each move by hand, and what it refuses."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from verl.config.best_rule import MetricRuleError
from verl.trainer.data import Mixture
from verl.trainer.launch.typed import load_config
from verl.trainer.ppo.keep import MixtureControl

KEEP = "val/rec_*/reward >= 0.9 of step 0"
SETTINGS = {"trainer.keep": KEEP, "trainer.test_freq": 10, "data.source_weights": "{rec_*: 0.1, general_*: 0.9}"}


def control_of(state: dict[str, Any] | None = None, sources: Any = ("rec_next",), **changes: Any) -> Any:
    settings = {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}}
    config = load_config([f"{key}={value}" for key, value in settings.items()])
    weights = config.data.source_weights
    mixture = Mixture(config.data, [(weight / sum(weights.values()), np.arange(9)) for weight in weights.values()])
    dataset: Any = SimpleNamespace(sources=list(sources))
    return MixtureControl(config, mixture, dataset, state or {}), mixture


def share_of(odds: float) -> float:
    return odds / (1 + odds)


def log_odds(share: Any) -> Any:
    return np.log(share) - np.log1p(-np.array(share))


def shares_over_time(start: float, lag: float, noise: float, validations: int = 40) -> list[float]:
    """Shares that the controller sets where a share s keeps 1 - 0.5 exp(-s / 0.08) of the metric, in the long run.

    Args:
        lag: part of the way there that is left after each validation.
        noise: standard deviation of a measurement, relative.
    """
    control, mixture = control_of(data__source_weights=f"{{rec_*: {start}, general_*: {1 - start}}}")
    random, metric, shares = np.random.default_rng(0), 1.0, []
    for step in range(validations + 1):
        control.note(step, {"val/rec_next/reward": metric * (1 + noise * random.normal() * (step > 0))})
        shares.append(mixture.shares["rec_*"])
        metric = lag * metric + (1 - lag) * (1 - 0.5 * math.exp(-shares[-1] / 0.08))
    return shares


@pytest.mark.parametrize("lag", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("start", [0.02, 0.1, 0.6])
def test_it_ends_where_the_bound_is_just_kept(start: float, lag: float) -> None:
    wanted = -0.08 * math.log(0.1 / 0.5)  # 0.129
    still, noisy = (log_odds(shares_over_time(start, lag, noise)) - log_odds(wanted) for noise in (0.0, 0.03))
    assert abs(still[8:]).max() < 0.2 and abs(still[-10:]).max() < 0.01, "after eight validations, and it stays"
    assert abs(noisy[12:].mean()) < 0.1 and noisy[12:].std() < 0.2


def test_each_move_by_hand() -> None:
    control, mixture = control_of()
    logged = control.note(0, {"val/rec_next/reward": 0.5})
    start = {"violation": -0.1 / 0.9, "lambda": math.log(11), "share": 0.1}
    assert logged == pytest.approx({f"keep/rec_*/{key}": value for key, value in start.items()})
    # The bound is 0.45; 0.36 misses a fifth of it, of which a tenth counts: 1 for lambda, and 1 for the share beside.
    logged = control.note(10, {"val/rec_next/reward": 0.36})
    assert logged["keep/rec_*/violation"] == pytest.approx(0.2)
    assert logged["keep/rec_*/lambda"] == pytest.approx(math.log(11) + 1)
    assert logged["keep/rec_*/share"] == mixture.shares["rec_*"] == pytest.approx(share_of(math.exp(2) / 9))
    # Kept by 0.02: another sign, so the rate is 7 from here on.
    control.note(20, {"val/rec_next/reward": 0.459})
    assert mixture.shares["rec_*"] == pytest.approx(share_of(math.exp(1 - 2 * 0.14) / 9))
    control.note(30, {"val/reward": 1.0})  # not measured
    assert mixture.shares["rec_*"] == pytest.approx(share_of(math.exp(1 - 0.14) / 9))
    for metric, bound in ((0.0, 0.9), (1.0, 0.01)):
        for step in range(40, 60):
            control.note(step, {"val/rec_next/reward": metric})
        assert mixture.shares["rec_*"] == pytest.approx(bound)
    assert sum(mixture.shares.values()) == pytest.approx(1.0)


def test_a_rate_that_was_changed_counts_after_a_resume() -> None:
    dual = {"lambda": math.log(11), "calm": 0.5, "last": 0.1}
    saved = {"start": {"val/rec_*/reward": 0.5}, "duals": {"rec_*": dual}}
    control, mixture = control_of({"keep": saved}, trainer__keep_rate=4)
    control.note(10, {"val/rec_next/reward": 0.36})  # 4 x .5 x .1 for lambda, and as much beside
    assert mixture.shares["rec_*"] == pytest.approx(share_of(math.exp(0.4) / 9))


def test_several_groups_and_the_worst_of_several_bounds() -> None:
    keep = "['val/rec/reward >= 0.5','val/rec/reverse_kl <= 2 by rec','val/code/reward >= 0']"
    weights = "{rec: 2, code: 2, a: 4.5, b: 1.5}"
    control, mixture = control_of(trainer__keep=keep, data__source_weights=weights, sources=("rec", "code"))
    metrics = {"val/rec/reward": 0.6, "val/rec/reverse_kl": 2.1, "val/code/reward": 0.0}
    control.note(0, metrics)
    logged = control.note(10, metrics)
    assert logged["keep/rec/violation"] == pytest.approx(0.05) and logged["keep/code/violation"] == 0
    odds = {"rec": math.e / 3, "code": 1 / 3, "a": 0.75, "b": 0.25}
    assert mixture.shares == pytest.approx({group: value / sum(odds.values()) for group, value in odds.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__keep": "val/rec/kl > 1"}, r"trainer\.keep='val/rec/kl > 1' is not understood; the form is NAME"),
        ({"trainer__test_freq": -1}, r"compares validations; set trainer\.test_freq=-1 to"),
        ({"trainer__val_before_train": False}, r"step 0, and trainer\.val_before_train=False leaves it out; set"),
        ({"data__source_weights": "{rec: 1, a: 1}"}, r"shares of \['rec_\*'\] .*'rec': 1.0, .* or end a bound"),
        ({"data__source_weights": "{rec_*: 1}"}, r"needs one group more for the rest"),
        ({"trainer__keep": f"{KEEP} by all"}, r"shares of \['all'\]"),
        ({"sources": ("general", "reco")}, r"names no metric of data\.val_files: val/general/reward, val/reco/reward"),
        ({"state": {"epoch": 0}}, r"the checkpoint has no metrics of step 0 for it; give the bound as a number"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control_of(**changes)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("val/reward", r"names val/rec_\*/reward, .* does not give; it gives val/reward"),
        ("val/rec_a/reward", "is 0 at"),
    ],
)
def test_a_first_validation_that_sets_no_bound_ends_the_run(metric: str, message: str) -> None:
    with pytest.raises(MetricRuleError, match=message):
        control_of()[0].note(0, {metric: 0.0})

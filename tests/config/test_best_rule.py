"""The grammar of ``trainer.best_metric``, and what it makes of metrics."""

import math
import re

import pytest

from verl.config.best_rule import BestRule, Bound, metric_value, require_known

START = {"val/general/reward": 0.1, "val/rec_a/reward": 0.5, "val/rec_b/reward": 0.3}
LONG = "a subject  to val/x_*/r <= -2 and c >= 1 of  step 0 and d <= .5"
LONG_BOUNDS = [("val/x_*/r", "<=", -2.0, False), ("c", ">=", 1.0, True), ("d", "<=", 0.5, False)]


@pytest.mark.parametrize(
    ("text", "name", "maximise", "bounds"),
    [
        ("  val/reward max", "val/reward", True, []),
        ("val/reverse_kl min", "val/reverse_kl", False, []),
        ("a subject to b >= 0.98 of step 0", "a", True, [("b", ">=", 0.98, True)]),
        ("a min subject to b>=1e-3", "a", False, [("b", ">=", 1e-3, False)]),
        (LONG, "a", True, LONG_BOUNDS),
        ("val/subject/and", "val/subject/and", True, []),
    ],
)
def test_rules(text: str, name: str, maximise: bool, bounds: list[tuple[str, str, float, bool]]) -> None:
    rule = BestRule.parse(text)
    assert (rule.name, rule.maximise, rule.bounds) == (name, maximise, tuple(Bound(*parts) for parts in bounds))
    assert rule.names == [name, *(parts[0] for parts in bounds)]
    assert rule.names_of_start == [parts[0] for parts in bounds if parts[3]]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        *((text, text) for text in ("", "val/reward best", "val/reward >= 0.5", "val/reward max min")),
        *((f"a subject to {part}", part) for part in ("b", "b > 1", "b >= 1 of step 1", "b >= 1 of step 0 and")),
        *((f"a subject to b >= {bound}", f"b >= {bound}") for bound in ("much", "nan", "98%")),
        ("a subject to b >= 1 and c", "c"),
    ],
)
def test_a_part_that_is_not_understood_is_named(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"trainer.best_metric={text!r}: {part!r} is not understood")):
        BestRule.parse(text)


def test_a_pattern_stands_for_a_mean() -> None:
    assert metric_value(START, "val/rec_*/reward") == pytest.approx(0.4)
    assert metric_value(START, "val/rec_a/reward") == 0.5
    assert math.isnan(metric_value(START, "val/*/loss"))
    exact = {"val/[x]/reward": 1.0, "val/x/reward": 3.0}
    assert metric_value(exact, "val/[x]/reward") == 1.0, "a name that is there is no pattern"


def test_bounds_of_step_0() -> None:
    rule = BestRule.parse("val/general/reward subject to val/rec_*/reward >= 0.98 of step 0")
    at_the_bound = {"val/general/reward": 0.9, "val/rec_a/reward": 0.98 * 0.5, "val/rec_b/reward": 0.98 * 0.3 + 1e-9}
    assert rule.qualifies(at_the_bound, START)
    assert not rule.qualifies(at_the_bound | {"val/rec_b/reward": 0.29}, START)
    assert not rule.qualifies(at_the_bound, {}), "nothing to compare with"
    described = "val/general/reward 0.9; val/rec_*/reward 0.392, bound >= 0.392 = 0.98 of step 0"
    assert rule.describe(at_the_bound, START) == described


def test_a_metric_that_is_missing_or_none_does_not_qualify() -> None:
    rule = BestRule.parse("a subject to b <= 1")
    assert rule.qualifies({"a": 1.0, "b": 1.0}, {})
    for metrics in ({"a": 1.0}, {"b": 1.0}, {"a": math.nan, "b": 1.0}, {"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 1.1}):
        assert not rule.qualifies(metrics, {})


def test_of_equals_none_is_better() -> None:
    for rule, better, worse in ((BestRule.parse("a"), 2.0, 1.0), (BestRule.parse("a min"), 1.0, 2.0)):
        assert rule.is_better({"a": better}, than={"a": worse})
        assert not rule.is_better({"a": worse}, than={"a": better}) and not rule.is_better({"a": 1.0}, than={"a": 1.0})


def test_unknown_names_are_listed_with_the_known_ones() -> None:
    rule = BestRule.parse("val/general/reward subject to val/rec*/recall >= 1")
    with pytest.raises(ValueError, match=r"names val/rec\*/recall, which .* it gives val/general/reward, val/rec_a/"):
        require_known("trainer.keep", rule.names, START)
    require_known("trainer.keep", ["val/general/reward", "val/rec*/reward"], START)

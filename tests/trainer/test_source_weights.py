"""Orders of rows by source weights (``data.source_weights``)."""

from collections import Counter

import numpy as np
import pytest

from verl.config import DataConfig
from verl.trainer.data import Mixture, group_by_weight
from verl.utils.dataset.rl_dataset import DropReport

SOURCES = ["general_a"] * 60 + ["general_b"] * 20 + ["rec_next"] * 9 + ["rec_caption"] * 11


def order_of(weights, seed=0, shuffle=True, count=100):
    config = DataConfig(source_weights=weights, seed=seed, shuffle=shuffle)
    return Mixture(config, group_by_weight(SOURCES, weights)).take(count)


@pytest.mark.parametrize("weights", [{"rec_*": 0.25, "*": 0.75}, {"general_*": 3, "rec_*": 1}])
def test_every_stretch_from_the_start_holds_the_shares(weights) -> None:
    order = order_of(weights)
    for length in range(1, len(SOURCES) + 1):
        items = sum(SOURCES[place].startswith("rec") for place in order[:length])
        assert abs(items - 0.25 * length) <= 1


def test_many_groups_have_their_shares_too() -> None:
    weights = [1, 40, 8, 3, 40, 1, 5, 1, 13, 40]
    groups = [(weight / sum(weights), np.full(1, number)) for number, weight in enumerate(weights)]
    names = {str(number): weight for number, weight in enumerate(weights)}
    given = Mixture(DataConfig(source_weights=names), groups).take(2000)
    for length in range(1, 2001):
        counts = np.bincount(given[:length], minlength=10)
        assert np.abs(counts - length * np.array(weights) / sum(weights)).max() < 2


def test_a_small_group_comes_round_again_only_when_all_of_it_has_come() -> None:
    order = order_of({"rec_*": 0.6, "*": 0.4})
    items = [place for place in order if SOURCES[place].startswith("rec")]
    assert len(items) == 60
    for start in range(0, 60, 20):
        assert sorted(items[start : start + 20]) == list(range(80, 100))
    assert items[:20] != items[20:40]
    others = Counter(place for place in order if place < 80)
    assert max(others.values()) == 1


def test_a_group_that_is_asked_for_less_than_it_has_gives_all_of_it_before_any_again() -> None:
    """An epoch has 40 of 80; without going on where the last one stopped some would come twice, and some never."""
    others = [[p for p in order_of({"rec_*": 0.6, "*": 0.4}, shuffle=s, count=400) if p < 80] for s in (True, False)]
    assert others[1] == [*range(80), *range(80)]
    assert sorted(others[0][:80]) == sorted(others[0][80:]) == [*range(80)] and others[0][:80] != others[0][80:]


def test_one_weight_for_all_is_a_permutation_that_the_seed_decides() -> None:
    assert sorted(order_of({"*": 2.5})) == list(range(100))
    assert order_of({"*": 2.5}, shuffle=False) == list(range(100))
    assert order_of({"*": 1}) == order_of({"*": 1}) != order_of({"*": 1}, seed=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"rec_*": 1}, r"matches no source \['general_a', 'general_b'\]"),
        (
            {"rec_*": 1, "general*": 1, "v*": 1},
            r"no usable row has a source like \['v\*'\]; there are .*\]; 2 dropped as extended_tokens: name a tea.*"
            "algorithm.distill.teachers.*; 1 dropped as no_user_turn: empty$",
        ),
    ],
)
def test_weights_that_do_not_fit_the_data(weights, message) -> None:
    reasons = [("extended_tokens", "video"), ("extended_tokens", "vlog"), ("extended_tokens", "rec_x")]
    reasons += [("no_user_turn", "video"), ("overlong", "general_a")]
    dropped = [{"reason": reason, "source": source, "detail": "empty"} for reason, source in reasons]
    with pytest.raises(ValueError, match=message):
        group_by_weight(SOURCES, weights, DropReport(None, Counter(SOURCES), dropped))

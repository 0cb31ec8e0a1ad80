"""Orders of rows by source weights (``data.source_weights``)."""

from collections import Counter

import numpy as np
import pytest

from verl.trainer.data import group_by_weight, mixed_order
from verl.utils.dataset.rl_dataset import DropReport

SOURCES = ["general_a"] * 60 + ["general_b"] * 20 + ["rec_next"] * 9 + ["rec_caption"] * 11


def order_of(weights, seed=0, shuffle=True, epoch=0):
    return mixed_order(group_by_weight(SOURCES, weights), np.random.default_rng(seed), shuffle, epoch)


@pytest.mark.parametrize("weights", [{"rec_*": 0.25, "*": 0.75}, {"general_*": 3, "rec_*": 1}])
def test_every_stretch_from_the_start_holds_the_shares(weights) -> None:
    order = order_of(weights)
    assert len(order) == len(SOURCES)
    for length in range(1, len(order) + 1):
        items = sum(SOURCES[place].startswith("rec") for place in order[:length])
        assert abs(items - 0.25 * length) <= 1


def test_a_small_group_comes_round_again_only_when_all_of_it_has_come() -> None:
    order = order_of({"rec_*": 0.6, "*": 0.4})
    items = [place for place in order if SOURCES[place].startswith("rec")]
    assert len(items) == 60
    for start in range(0, 60, 20):
        assert sorted(items[start : start + 20]) == list(range(80, 100))
    assert items[:20] != items[20:40]
    others = Counter(place for place in order if place < 80)
    assert max(others.values()) == 1


def test_without_shuffling_an_epoch_goes_on_where_the_last_one_stopped() -> None:
    """A group that is asked for less than it has would otherwise show the same rows for ever."""
    epochs = [order_of({"rec_*": 0.6, "*": 0.4}, shuffle=False, epoch=epoch) for epoch in range(4)]
    taken = [place for order in epochs for place in order if place < 80]
    assert taken == [*range(80), *range(80)], "40 of 80 in each epoch"
    items = [place for order in epochs for place in order if place >= 80]
    assert items == list(range(80, 100)) * 12


def test_one_weight_for_all_is_a_permutation_that_the_generator_decides() -> None:
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

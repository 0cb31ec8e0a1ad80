"""The ids of a run in numbers."""

import pytest

from verl.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("extend_start", "shared"), [(151669, 151669), (151700, 151669), (150000, 150000), (None, 151669)]
)
def test_the_shared_ids_end_at_the_smaller_of_the_two_limits(extend_start: int | None, shared: int) -> None:
    assert Vocabulary(176247, extend_start).shared_ids(151669) == shared
    assert Vocabulary(151669, extend_start).shared_ids() == shared
    assert Vocabulary(151669, extend_start).shared_ids(176247) == shared

"""Rows of a batch as model inputs, drawn token by token."""

import pytest
import torch

from verl.ops.sequence_parallel import SequenceGroup
from verl.workers.fsdp.token_stats_model import BatchSizes, ScoredRows

# P = 3, R = 4; . is padding, the scored response positions are marked below.
INPUT_IDS = torch.tensor(
    [
        [0, 11, 12, 21, 22, 23, 0],  # . p p r r r .
        [31, 32, 33, 41, 0, 0, 0],  #  p p p r . . .
        [0, 0, 51, 61, 62, 63, 64],  # . . p r r r r
        [0, 71, 72, 0, 0, 0, 0],  #    . p p . . . .
    ]
)
ATTENTION = (INPUT_IDS > 0).long()
ALL_RESPONSE = ATTENTION[:, 3:].bool()


def test_packed_rows_stand_end_to_end() -> None:
    (micro,) = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE).micro_batches(BatchSizes(0, 4), packed=True)
    inputs = micro.inputs
    assert inputs.input_ids.tolist() == [[11, 12, 21, 22, 31, 32, 33, 51, 61, 62, 63]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]
    assert inputs.row_lengths == (4, 3, 4)
    assert inputs.select_index.tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    assert inputs.labels.tolist() == [21, 22, 23, 41, 61, 62, 63, 64]
    assert micro.rows.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert micro.columns.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    # Every rank must run the model as often as the others: a micro-batch with nothing to score has a token.
    _, second = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE).micro_batches(BatchSizes(0, 3), packed=True)
    assert second.inputs.input_ids.shape == (1, 1) and second.rows.tolist() == []


def test_ranks_that_share_rows_take_parts_of_tokens_and_positions() -> None:
    """Four tokens each of 11 and a padded one; three, three and two of the eight scored positions."""
    rows = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE)
    parts = [rows.micro_batches(BatchSizes(0, 4), True, SequenceGroup(rank, 3))[0] for rank in range(3)]
    inputs = [part.inputs for part in parts]
    assert [part.input_ids.tolist() for part in inputs] == [[[11, 12, 21, 22]], [[31, 32, 33, 51]], [[61, 62, 63, 0]]]
    assert [part.position_ids.tolist() for part in inputs] == [[[0, 1, 2, 3]], [[0, 1, 2, 0]], [[1, 2, 3, 0]]]
    assert {part.row_lengths for part in inputs} == {(4, 3, 4, 1)}
    assert [part.labels.tolist() for part in inputs] == [[21, 22, 23], [41, 61, 62], [63, 64]]
    assert [part.rows.tolist() for part in parts] == [[0, 0, 0], [1, 2, 2], [2, 2]]
    assert [part.columns.tolist() for part in parts] == [[0, 1, 2], [0, 0, 1], [2, 3]]
    assert [part.select_index.tolist() for part in inputs] == [[1, 2, 3], [2, 3], [0, 1, 2]]
    sent, received = zip(*(part.exchanged for part in inputs), strict=True)
    assert sent == ([3, 0, 0], [0, 2, 0], [0, 1, 2])  # the state that predicts 62 is computed by rank 2
    assert received == tuple(map(list, zip(*sent, strict=True)))
    # A teacher of row 2 alone scores the positions of it that each rank has.
    teachers = [rows.build([2], True, SequenceGroup(rank, 3), shares=[0, 2, 2]) for rank in range(3)]
    assert [part.inputs.labels.tolist() for part in teachers] == [[], [61, 62], [63, 64]]


def test_micro_batches_of_ranks_that_share_rows_hold_as_many_tokens_on_each() -> None:
    rows, group = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE), SequenceGroup(0, 2)
    sizes = [micro.inputs.input_ids.numel() for micro in rows.micro_batches(BatchSizes(4), True, group)]
    assert sizes == [4, 2], "7 or 8 tokens of two rows, and of the third row 3 or 4"


def test_padded_rows_are_cut_to_the_longest() -> None:
    (micro,) = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE).micro_batches(BatchSizes(0, 4), packed=False)
    inputs = micro.inputs
    assert inputs.input_ids.tolist() == [[11, 12, 21, 22], [31, 32, 33, 0], [51, 61, 62, 63]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert inputs.row_lengths is None
    assert inputs.select_index.tolist() == [1, 2, 3, 6, 8, 9, 10, 11]
    assert inputs.labels.tolist() == [21, 22, 23, 41, 61, 62, 63, 64]


def test_what_follows_the_last_scored_token_is_not_computed() -> None:
    select = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    rows = ScoredRows(INPUT_IDS, ATTENTION, select)
    assert rows.lengths.tolist() == [2, 0, 2, 0]
    (micro,) = rows.micro_batches(BatchSizes(0, 4), packed=True)
    assert micro.inputs.input_ids.tolist() == [[11, 12, 51, 61]]
    assert micro.inputs.labels.tolist() == [21, 62]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [4, 7, 8, 100])
def test_every_scored_position_comes_once_and_limits_hold(max_tokens: int, packed: bool) -> None:
    micros = ScoredRows(INPUT_IDS, ATTENTION, ALL_RESPONSE).micro_batches(BatchSizes(max_tokens), packed)
    seen = sorted((int(r), int(c)) for micro in micros for r, c in zip(micro.rows, micro.columns, strict=True))
    assert seen == sorted((int(r), int(c)) for r, c in ALL_RESPONSE.nonzero())
    assert all(micro.inputs.input_ids.numel() <= max_tokens for micro in micros)


def test_a_response_without_prompt_is_an_error() -> None:
    attention = ATTENTION.clone()
    attention[1, :3] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no prompt token"):
        ScoredRows(INPUT_IDS, attention, ALL_RESPONSE)

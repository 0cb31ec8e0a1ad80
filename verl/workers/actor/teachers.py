"""How a frozen teacher comes to judge positions of a student's micro-batch.

In:  positions of a mini-batch in the student's order. Out: log-probs at these positions, chunk by chunk
(``utils.teacher_log_probs``). A teacher of this process reads its rows in its own layout. Others have read them before
the update: one named its likeliest ids, which stand in the batch; one on other ranks lent its hidden states by row.

Letters: M rows of the mini-batch, S positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from verl.ops.teacher_log_probs import LinearTeacher, StitchedTeacher, TeacherLogProbs, TopLogProbs
from verl.ops.teacher_log_probs import Teacher as WholeTeacher
from verl.protocol import DataProto
from verl.workers.actor.row_layout import BatchSizes, MicroBatch, ScoredRows

TOP_TENSORS = ("teacher_top_ids", "teacher_top_log_probs", "teacher_rest_log_prob")
"""Where a batch holds what its rows' teachers named as the likeliest ids."""
HIDDEN_STATE_HANDLES = "teacher_states"
"""Where a batch holds handles to what its rows' teachers lent."""


class ScoredPositions(NamedTuple):
    """Positions that one teacher judges, all of those that are scored in their rows."""

    mini: DataProto
    """All M rows."""
    layout: ScoredRows
    """Their tokens."""
    rows: torch.Tensor
    """(S,) row in the mini-batch."""
    columns: torch.Tensor
    """(S,) position in the response."""

    @property
    def chosen(self) -> list[int]:
        """The rows, once each, in the student's order, which need not be that of the batch."""
        return list(dict.fromkeys(self.rows.tolist()))

    def build(self, packed: bool) -> MicroBatch:
        """The rows as model inputs, with the positions in their order."""
        micro = self.layout.build(self.chosen, packed)
        self.require_order(micro.rows, micro.columns)
        return micro

    @property
    def labels(self) -> torch.Tensor:
        """(S,) the tokens at the positions."""
        responses = self.layout.input_ids[:, -self.layout.select.shape[1] :]
        return responses[self.rows, self.columns]

    def require_order(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Positions that something was computed for have to be those of the student, one by one."""
        assert torch.equal(rows, self.rows) and torch.equal(columns, self.columns), (
            "a teacher judged other positions than those that the student trains"
        )


class Teacher(Protocol):
    """Whoever judges rows in an update."""

    knows_extended: bool
    """Whether it knows all of the student's ids."""

    def teach(self, taught: ScoredPositions, temperature: float) -> TeacherLogProbs:
        """Log-probs at the positions, in their order; every rank has to call it as often."""


class FullTeacher(Teacher, Protocol):
    """A teacher whose distributions are known as a whole."""

    def teach(self, taught: ScoredPositions, temperature: float) -> WholeTeacher:
        """As `Teacher.teach`."""


class ModelTeacher(FullTeacher, Protocol):
    """A teacher that is one model."""

    def teach(self, taught: ScoredPositions, temperature: float) -> LinearTeacher:
        """As `Teacher.teach`."""


class StitchedModelTeacher:
    """A base teacher on the ids it knows and one with the student's vocabulary on the others; both read every row."""

    knows_extended = True

    def __init__(self, base: ModelTeacher, own: ModelTeacher) -> None:
        self._base, self._own = base, own

    def teach(self, taught: ScoredPositions, temperature: float) -> StitchedTeacher:
        """See `Teacher`."""
        return StitchedTeacher(self._base.teach(taught, temperature), self._own.teach(taught, temperature))


class TopKTeacher:
    """A teacher that named its likeliest ids before the update; they stand in the batch.

    Args:
        knows_extended: see `Teacher`.
        vocab_size: ids of the student that it knows.
        device: where the student computes.
    """

    def __init__(self, knows_extended: bool, vocab_size: int, device: torch.device) -> None:
        self.knows_extended = knows_extended
        self._vocab_size, self._device = vocab_size, device

    def teach(self, taught: ScoredPositions, temperature: float) -> TeacherLogProbs:
        """See `Teacher`.

        Raises:
            ValueError: it named an id that the student lacks.
        """
        ids, log_probs, rest = (
            taught.mini.tensor(key)[taught.rows, taught.columns].to(self._device) for key in TOP_TENSORS
        )
        if ids.numel() and int(ids.max()) >= self._vocab_size:
            raise ValueError(
                f"a teacher names id {int(ids.max())} among its likeliest, and the student has {self._vocab_size} ids "
                "that it may know; algorithm.distill.objective=topk needs a teacher without other ids"
            )
        top = TopLogProbs(ids.long(), log_probs, rest, self._vocab_size)
        return top.rows


def states_by_row(taught: ScoredPositions, log_probs: WholeTeacher) -> Iterator[tuple[int, DataProto]]:
    """Each row, and what `RemoteTeacher` has to know of its positions, on the CPU."""
    columns = {"columns": taught.columns, "labels": taught.labels}
    columns |= {f"hidden_{part}": states.cpu() for part, states in enumerate(log_probs.hidden_states)}
    for row in taught.chosen:
        yield row, DataProto.from_dict({key: values[taught.rows == row] for key, values in columns.items()})


class RemoteTeacher:
    """A teacher on other ranks, whose hidden states at the trained positions are fetched row by row.

    Args:
        knows_extended: see `Teacher`.
        heads: (V, D) of the teacher; of both models, the base teacher first, where it is stitched.
        fetch: the values of the handles that stand in the batch.
    """

    def __init__(
        self, knows_extended: bool, heads: Sequence[torch.Tensor], fetch: Callable[[Sequence[Any]], list[Any]]
    ) -> None:
        self.knows_extended = knows_extended
        self._heads, self._fetch = heads, fetch

    def teach(self, taught: ScoredPositions, temperature: float) -> WholeTeacher:
        """See `Teacher`."""
        chosen, handles = taught.chosen, taught.mini.array(HIDDEN_STATE_HANDLES)
        lent: list[DataProto] = self._fetch([handles[row] for row in chosen])

        def joined(key: str, like: torch.Tensor) -> torch.Tensor:
            """A column of all rows, in the student's order; no row leaves it empty."""
            return torch.cat([like[:0].cpu(), *(row.tensor(key) for row in lent)]).to(like.device)

        lengths = torch.tensor([len(row) for row in lent], dtype=torch.int64)
        rows = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(lengths)
        taught.require_order(rows, joined("columns", taught.columns))
        assert torch.equal(joined("labels", taught.labels), taught.labels), "hidden states of other rows were fetched"
        teachers = [
            LinearTeacher(joined(f"hidden_{part}", head), head, len(head), temperature)
            for part, head in enumerate(self._heads)
        ]
        return teachers[0] if len(teachers) == 1 else StitchedTeacher(*teachers)


@torch.no_grad()
def judged(
    teacher: FullTeacher, data: DataProto, select: torch.Tensor, sizes: BatchSizes, packed: bool, temperature: float
) -> Iterator[tuple[ScoredPositions, WholeTeacher]]:
    """The selected positions of a batch, micro-batch by micro-batch, with what the teacher gives there.

    Args:
        data: rows with ``input_ids`` and ``attention_mask``.
        select: (B, R) bool, real tokens.
        sizes: of micro-batches.
        packed: layout that the sizes are for.
    """
    layout = ScoredRows(data.tensor("input_ids"), data.tensor("attention_mask"), select)
    for micro in layout.micro_batches(sizes, packed):
        taught = ScoredPositions(data, layout, micro.rows, micro.columns)
        yield taught, teacher.teach(taught, temperature)

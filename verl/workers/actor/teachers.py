"""Teachers on one rank: where their log-probs at the student's positions come from, before an update or in it.

In:  positions of a batch, in the order of the student's micro-batch. Out: the teacher's log-probs at these positions,
a chunk at a time (``ops.linear_log_prob``).

    ModelTeacher           a frozen model of this process; one forward pass over the rows of the positions
    StitchedTeacher        two of them: one for the shared ids, one for the extended ids
    StitchedServedTeacher  of these the first is served; what servers know of the positions is part of the batch
    RemoteTeacher          a model on other ranks; its hidden states were computed before the update, and are fetched
    TopKTeacher            its likeliest ids were computed before the update, and are part of the batch

Letters: B rows of the batch, S positions, D hidden size, V rows of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from verl.ops.linear_log_prob import FullLogProbs, LinearLogProbs, StitchedLogProbs, TeacherLogProbs, TopLogProbs
from verl.protocol import DataProto
from verl.vocabulary import Vocabulary
from verl.workers.fsdp.adapter import as_frozen
from verl.workers.fsdp.token_stats_model import MicroBatch, ScoredRows, TokenStatsModel, no_positions

TOP_TENSORS = ("teacher_top_ids", "teacher_top_log_probs", "teacher_rest_log_prob")
"""Batch keys of the teachers' likeliest ids."""
SCORES_OF_BASE = ("ref_log_prob", *TOP_TENSORS)
"""Batch keys that workers read of a served base teacher."""
SHARED_IDS = "shared_ids"
"""Entry of ``meta_info``: number of ids that a served base teacher knows."""


def empty_scores(select: torch.Tensor, topk: int | None) -> dict[str, torch.Tensor]:
    """Zeros for the scores of rows like ``select`` (B, R): ``ref_log_prob``, and with ``topk`` `TOP_TENSORS`."""
    scores = {"ref_log_prob": torch.zeros(select.shape)}
    if topk is not None:
        shape = (*select.shape, topk)
        empty = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape), torch.zeros(select.shape)
        scores |= dict(zip(TOP_TENSORS, empty, strict=True))
    return scores


class ScoredPositions(NamedTuple):
    """Positions that one teacher scores: all scored positions of their rows, or, where a sequence group splits
    these, those of this rank."""

    batch: DataProto
    layout: ScoredRows
    """All B rows of the batch."""
    rows: torch.Tensor
    """(S,) row in the batch."""
    columns: torch.Tensor
    """(S,) position in the response."""
    rows_by_rank: Sequence[torch.Tensor]
    """``rows`` of each rank of the sequence group."""

    @property
    def distinct_rows(self) -> list[int]:
        """The rows, once each, in the order of the positions, which may differ from that of the batch."""
        return list(dict.fromkeys(torch.cat(list(self.rows_by_rank)).tolist()))

    @property
    def labels(self) -> torch.Tensor:
        """(S,) the drawn tokens."""
        return self.batch.tensor("responses")[self.rows, self.columns]

    def require_order(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Assert that something was computed for these very positions, in their order."""
        same = torch.equal(rows, self.rows) and torch.equal(columns, self.columns)
        assert same, "a teacher scored other positions than those that the student trains"


class ModelTeacher:
    """A frozen model of this process.

    Args:
        module: the model; or the student's own, whose adapter is switched off for the pass.
        ids: number of ids in its softmax.
        replace_token_id: replaces the ids that it lacks in its input; None: it knows all of the student's ids.
    """

    def __init__(self, module: TokenStatsModel, ids: int, replace_token_id: int | None) -> None:
        self.module, self.ids, self.packed, self.group = module, ids, module.packed, module.group
        self.knows_extended = replace_token_id is None
        self.models = [self]
        """As for a stitched teacher, which has two: the base teacher's first."""
        self.head_handles: list[Any] | None = None
        """Handles to its head, once it was exported; the head never changes."""
        self._replace_token_id = replace_token_id

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> LinearLogProbs:
        """Log-probs at the positions, in their order; every rank has to call it equally often.

        The result reads the gathered head: it has to be used before `reshard`.
        """
        shares = [len(rows) for rows in positions.rows_by_rank]
        micro = positions.layout.build(positions.distinct_rows, self.packed, self.group, shares)
        positions.require_order(micro.rows, micro.columns)
        return LinearLogProbs(*self._forward(micro), self.ids, temperature)

    def head(self) -> torch.Tensor:
        """(ids, D) the gathered head, to be used before `reshard`; all ranks have to call it."""
        # FSDP gathers a head in a forward pass; one over a single token does.
        return self._forward(no_positions(self.packed))[1][: self.ids].detach()

    @torch.no_grad()
    def _forward(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, D) hidden states and the (V, D) head."""
        inputs = micro.inputs
        if self._replace_token_id is not None:
            readable = inputs.input_ids.masked_fill(inputs.input_ids >= self.ids, self._replace_token_id)
            inputs = inputs._replace(input_ids=readable)
        with as_frozen(self.module):
            # A head that computes nothing.
            return self.module(inputs.to(self.module.device), lambda hidden, weight, labels: (hidden, weight))


class StitchedTeacher:
    """A base teacher on the shared ids and one with the student's vocabulary on the others; both read every row."""

    knows_extended = True

    def __init__(self, base: ModelTeacher, own: ModelTeacher) -> None:
        self.models, self.packed, self.group = [base, own], own.packed, own.group

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> StitchedLogProbs:
        """As `ModelTeacher.log_probs_at`."""
        return StitchedLogProbs(*(model.log_probs_at(positions, temperature) for model in self.models))


class StitchedServedTeacher:
    """As `StitchedTeacher`, before an update, with a base teacher whose scores of the rows are in the batch."""

    knows_extended = True

    def __init__(self, own: ModelTeacher) -> None:
        self.models, self.packed, self.group = [own], own.packed, own.group

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> "ServedStitchedLogProbs":
        """As `ModelTeacher.log_probs_at`."""
        batch, labels, at = positions.batch, positions.labels, (positions.rows, positions.columns)
        own, drawn = self.models[0].log_probs_at(positions, temperature), batch.tensor("ref_log_prob")[at]
        known = labels < batch.meta_info[SHARED_IDS]
        # Without likeliest ids: no columns, and all of the base teacher's mass (log 1 = 0) is the rest's.
        ids, log_probs, rest = labels[:, None][:, :0], drawn[:, None][:, :0], torch.zeros_like(drawn)
        if TOP_TENSORS[0] in batch.batch:
            ids, log_probs, rest = (batch.tensor(key)[at] for key in TOP_TENSORS)
        token = labels.where(known, 0)[:, None], drawn.where(known, -torch.inf)[:, None]
        # What the token has is no part of the others' mass; in float64, for the difference may be small.
        is_other = known & (ids != labels[:, None]).all(dim=1)
        others = (rest.double().exp() - drawn.double().exp()).clamp(min=0).log().to(rest.dtype)
        parts = *token, ids.long(), log_probs, others.where(is_other, rest)
        return ServedStitchedLogProbs(
            own, batch.meta_info[SHARED_IDS], *(part.to(self.models[0].module.device) for part in parts)
        )


class ServedStitchedLogProbs(StitchedLogProbs):
    """Only the drawn token (N, 1) and the K likeliest ids (N, K) of the base teacher are known.

    Its other ids get -inf, and their total mass is one extra last column.
    """

    def __init__(self, own: LinearLogProbs, shared_ids: int, *known: torch.Tensor) -> None:
        self.vocab_size, self.hidden_states, self._own, self._shared_ids = own.vocab_size, (), own, shared_ids
        self._known = known

    def __call__(self, rows: slice) -> torch.Tensor:
        log_q = self._own(rows)
        token, of_token, ids, log_probs, others = (part[rows] for part in self._known)
        shared = log_q[:, : self._shared_ids]  # a view, overwritten below
        outside = shared.logsumexp(dim=-1, keepdim=True)
        # The token first: where it is none of the base teacher's, its place is that of another.
        shared.fill_(-torch.inf).scatter_(1, token, of_token + outside).scatter_(1, ids, log_probs + outside)
        return torch.cat([log_q, others[:, None] + outside], dim=1)


class TopKTeacher:
    """A teacher whose likeliest ids were computed before the update; they are part of the batch.

    Args:
        knows_extended: whether it knows all of the student's ids.
        vocabulary: the student's.
        device: where the student computes.
    """

    def __init__(self, knows_extended: bool, vocabulary: Vocabulary, device: torch.device) -> None:
        self.knows_extended, self._device = knows_extended, device
        self._ids = vocabulary.ids if knows_extended else vocabulary.shared_ids()

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> TeacherLogProbs:
        """As `ModelTeacher.log_probs_at`."""
        ids, log_probs, rest = (
            positions.batch.tensor(key)[positions.rows, positions.columns].to(self._device) for key in TOP_TENSORS
        )
        if ids.numel() and int(ids.max()) >= self._ids:
            raise ValueError(
                f"a teacher's likeliest ids hold {int(ids.max())}, and {self._ids} ids are shared with the student; "
                "algorithm.distill.objective=topk needs a teacher without other ids"
            )
        return TopLogProbs(ids.long(), log_probs, rest, self._ids).rows


class RemoteTeacher:
    """A teacher on other ranks, whose hidden states at the trained positions are fetched row by row.

    Args:
        knows_extended: whether it knows all of the student's ids.
        heads: (V, D) of its model; of a stitched teacher both, the base teacher's first.
        fetch: gives the values of handles.
    """

    def __init__(
        self, knows_extended: bool, heads: Sequence[torch.Tensor], fetch: Callable[[Sequence[Any]], list[Any]]
    ) -> None:
        self.knows_extended, self._heads, self._fetch = knows_extended, heads, fetch

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> FullLogProbs:
        """As `ModelTeacher.log_probs_at`."""
        distinct, handles = positions.distinct_rows, positions.batch.array("teacher_states")
        by_row: list[DataProto] = self._fetch([handles[row] for row in distinct])

        def joined(key: str, like: torch.Tensor) -> torch.Tensor:
            """A column of all rows in the student's order; empty where there are no rows."""
            return torch.cat([like[:0].cpu(), *(row.tensor(key) for row in by_row)]).to(like.device)

        lengths = torch.tensor([len(row) for row in by_row], dtype=torch.int64)  # positions of each row
        rows = torch.tensor(distinct, dtype=torch.int64).repeat_interleave(lengths)
        positions.require_order(rows, joined("columns", positions.columns))
        same_tokens = torch.equal(joined("labels", positions.labels), positions.labels)
        assert same_tokens, "hidden states of other rows were fetched"
        teachers = [
            LinearLogProbs(joined(f"hidden_{part}", head), head, len(head), temperature)
            for part, head in enumerate(self._heads)
        ]
        return teachers[0] if len(teachers) == 1 else StitchedLogProbs(*teachers)


FullTeacher = ModelTeacher | StitchedTeacher | StitchedServedTeacher
"""A teacher of this process, which computes distributions on demand."""
Teacher = FullTeacher | TopKTeacher | RemoteTeacher
"""Scores the rows of an update."""


def hidden_states_by_row(positions: ScoredPositions, log_probs: FullLogProbs) -> Iterator[tuple[int, DataProto]]:
    """Each row, and what `RemoteTeacher` fetches for it: positions, tokens and hidden states, on the CPU."""
    columns = {"columns": positions.columns, "labels": positions.labels}
    columns |= {f"hidden_{part}": states.cpu() for part, states in enumerate(log_probs.hidden_states)}
    for row in positions.distinct_rows:
        yield row, DataProto.from_dict({key: values[positions.rows == row] for key, values in columns.items()})

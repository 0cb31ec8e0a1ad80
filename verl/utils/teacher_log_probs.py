"""What frozen teachers give the ids of a vocabulary, a chunk of positions at a time.

In:  hidden states (N, D) and a frozen head (V, D), of one model or of two. Out: log-probs of the ids for the rows of a
chunk (C, T), or what is to be known of them: the drawn token's. The logits of all N positions never exist.

Not here: which model reads what, and what a student makes of it (``linear_divergence``).

Letters: N positions, D hidden size, V rows of a head, T <= V ids of a teacher, B those that a base teacher knows,
E the others, C rows of a chunk.
"""

from collections.abc import Callable, Sequence

import torch

from verl.utils.linear_log_prob import row_chunks, scaled_logits

TeacherLogProbs = Callable[[slice], torch.Tensor]
"""Rows of the positions -> (C, T) log-probs of the first T ids, in memory of its own, which callers overwrite."""
DEFAULT_CHUNK_BYTES = 384 * 2**20
"""Of all buffers of one chunk together."""
BUFFERS = 3
"""(C, T) buffers of the logits' precision that live at once where tokens are scored."""


class LinearTeacher:
    """What a frozen head gives the first ``vocab_size`` ids: ``log_softmax(hidden @ weight[:vocab_size].T / T)``."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, temperature: float = 1.0) -> None:
        if not 0 < vocab_size <= weight.shape[0]:
            raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {weight.shape[0]} rows of the head")
        self.vocab_size = vocab_size
        self._hidden, self._weight, self._temperature = hidden, weight[:vocab_size], temperature

    def __call__(self, rows: slice) -> torch.Tensor:
        logits = scaled_logits(self._hidden[rows], self._weight, self._temperature)
        return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))


class StitchedTeacher:
    """One teacher on B, another on E: a proper distribution over all ids of the second.

    With d the mass that ``own``, which knows all ids, gives E at a position::

        q(v) = (1 - d) q_base(v)                for v in B
        q(v) = d q_own(v | E) = q_own(v)        for v in E

    Args:
        base: knows B alone.
        own: knows all ids.
    """

    def __init__(self, base: LinearTeacher, own: LinearTeacher) -> None:
        if base.vocab_size > own.vocab_size:
            raise ValueError(
                f"the base teacher knows {base.vocab_size} ids and the other one, which should know more, "
                f"{own.vocab_size}"
            )
        self.vocab_size = own.vocab_size
        self._base, self._own = base, own

    def __call__(self, rows: slice) -> torch.Tensor:
        log_q = self._own(rows)
        shared = log_q[:, : self._base.vocab_size]
        outside = shared.logsumexp(dim=-1, keepdim=True)  # log(1 - d), exact where d is nearly 1
        shared.copy_(self._base(rows)).add_(outside)
        return log_q


Teacher = LinearTeacher | StitchedTeacher


def drawn_log_probs(
    teacher: Teacher, labels: torch.Tensor, missing: float, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> torch.Tensor:
    """(N,) log-probs of the tokens that were drawn.

    Args:
        teacher: of N positions.
        labels: (N,) int64 ids of the tokens.
        missing: what an id gets that the teacher does not know.
        chunk_bytes: memory for the buffers of a chunk; changes memory and speed, not the result.
    """
    known = labels < teacher.vocab_size
    chosen = labels.where(known, 0)[:, None]
    parts = [
        teacher(rows).gather(1, chosen[rows]).squeeze(1)
        for rows in row_chunks(len(labels), rows_of_chunk(teacher.vocab_size, chunk_bytes))
    ]
    return _joined(parts, labels.device).masked_fill(~known, missing)


def rows_of_chunk(vocab_size: int, chunk_bytes: int) -> int:
    """Positions whose buffers fit."""
    return max(1, chunk_bytes // (BUFFERS * vocab_size * torch.float32.itemsize))


def _joined(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([*parts]) if parts else torch.zeros(0, device=device)

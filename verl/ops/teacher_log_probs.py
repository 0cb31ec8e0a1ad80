"""Log-probs of frozen teachers over the ids of a vocabulary, a chunk of positions at a time.

In:  hidden states (N, D) and a frozen head (V, D), of one model or of two. Out: log-probs of the ids for the rows of a
chunk (C, T), or of the drawn tokens and the likeliest ids alone. The logits of all N positions never exist.

Not here: the teachers' forward passes (``workers.actor.teachers``), the student's loss (``linear_divergence``).

Letters: N positions, D hidden size, V rows of a head, T <= V ids of a teacher, B those that a base teacher knows,
E the others, C rows of a chunk, K likeliest ids.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from verl.ops.linear_log_prob import row_chunks, scaled_logits
from verl.vocabulary import Vocabulary


class TopLogProbs(NamedTuple):
    """The K likeliest of ``vocab_size`` ids, and the mass of all others."""

    ids: torch.Tensor
    """(N, K) int64; where there are fewer than K ids, the likeliest stands again in their place."""
    log_probs: torch.Tensor
    """(N, K) log-probs of these ids."""
    rest: torch.Tensor
    """(N,) log of the mass of all other ids; -inf where there is none."""
    vocab_size: int

    def rows(self, rows: slice) -> "TopLogProbs":
        """Some of the positions."""
        return self._replace(ids=self.ids[rows], log_probs=self.log_probs[rows], rest=self.rest[rows])

    def completed(self, log_p: torch.Tensor, least: float) -> torch.Tensor:
        """(N, vocab_size) log-probs of the distribution that spreads the rest as ``p`` does over the other ids.

        Any divergence between it and ``p`` is that of the two with all other ids in one bucket, in value and, with this
        held fixed, in gradient: inside the bucket the two do not differ.

        Args:
            log_p: (N, >= vocab_size) of a student.
            least: lower bound of the rest.
        """
        # What the student gives the other ids; an id that stands twice is struck out twice and counts once.
        log_q = log_p[:, : self.vocab_size].scatter(1, self.ids, -torch.inf)
        rest = log_q.logsumexp(dim=-1)
        # Elsewhere q = p x teacher's rest / student's rest, in logs; a student's rest of 0 has nothing to scale.
        ratio = torch.where(rest > -torch.inf, rest - self.rest.clamp(min=least), 0.0)
        torch.sub(log_p[:, : self.vocab_size], ratio[:, None], out=log_q)
        return log_q.scatter_(1, self.ids, self.log_probs.to(log_q.dtype))


TeacherLogProbs = Callable[[slice], torch.Tensor | TopLogProbs]
"""Rows of the positions -> (C, T) log-probs of the first T ids, in memory of its own, which callers overwrite; or the
likeliest ids alone."""
DEFAULT_CHUNK_BYTES = 384 * 2**20
"""Of all buffers of one chunk together."""
BUFFERS = 3
"""(C, T) buffers of the logits' precision that live at once where tokens are scored."""


class LinearTeacher:
    """Log-probs of a frozen head's first ids: ``log_softmax(hidden @ weight[:vocab_size].T / temperature)``."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, temperature: float = 1.0) -> None:
        Vocabulary(vocab_size).check_head(weight.shape[0])
        self.vocab_size = vocab_size
        self.hidden_states = (hidden,)
        """(N, D) of each model, the base teacher's first."""
        self._weight, self._temperature = weight[:vocab_size], temperature

    def __call__(self, rows: slice) -> torch.Tensor:
        logits = scaled_logits(self.hidden_states[0][rows], self._weight, self._temperature)
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
        self.vocab_size = own.vocab_size
        self.hidden_states = (*base.hidden_states, *own.hidden_states)
        self._base, self._own = base, own

    def __call__(self, rows: slice) -> torch.Tensor:
        log_q = self._own(rows)
        shared = log_q[:, : self._base.vocab_size]  # a view, overwritten below
        outside = shared.logsumexp(dim=-1, keepdim=True)  # log(1 - d), exact where d is nearly 1
        shared.copy_(self._base(rows)).add_(outside)
        return log_q


FullLogProbs = LinearTeacher | StitchedTeacher
"""Teachers whose whole distributions are known."""


def score_tokens(
    teacher: FullLogProbs,
    labels: torch.Tensor,
    missing: float,
    *,
    topk: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[torch.Tensor, TopLogProbs | None]:
    """Score the tokens that were drawn, and find the likeliest ids.

    Args:
        teacher: of N positions.
        labels: (N,) int64 ids of the tokens.
        missing: log-prob of an id that the teacher does not know.
        topk: K; None: no likeliest ids.
        chunk_bytes: memory for the buffers of a chunk; changes memory and speed, not the result.

    Returns:
        (N,) log-probs of the tokens that were drawn, and the likeliest ids; None without ``topk``.
    """
    size = teacher.vocab_size
    known = labels < size
    chosen = labels.where(known, 0)[:, None]
    drawn = torch.full(labels.shape, missing, device=labels.device)
    top = None
    if topk is not None:
        of_ids, of_rest = torch.zeros(len(labels), topk, device=labels.device), torch.zeros_like(drawn)
        top = TopLogProbs(torch.zeros_like(of_ids, dtype=torch.int64), of_ids, of_rest, size)
    for rows in row_chunks(len(labels), max(1, chunk_bytes // (BUFFERS * size * torch.float32.itemsize))):
        log_q = teacher(rows)
        values = log_q.gather(1, chosen[rows]).squeeze(1)
        drawn[rows] = values.where(known[rows], missing).to(drawn.dtype)
        if top is not None:
            likeliest, ids = log_q.topk(min(topk or 0, size), dim=-1)
            for found, target in ((ids, top.ids[rows]), (likeliest, top.log_probs[rows])):
                target[:, : found.shape[1]] = found
                target[:, found.shape[1] :] = found[:, :1]
            # As a sum over the others: one less the mass of the likeliest would be rounding where that is nearly all.
            top.rest[rows] = log_q.scatter_(1, ids, -torch.inf).logsumexp(dim=-1)
        del log_q  # before the next chunk makes its own
    return drawn, top

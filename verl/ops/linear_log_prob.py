"""Log-probs of tokens straight from hidden states and the lm head: the student's, and those of frozen teachers.

In:  hidden states (N, D), head weight (V, D), the tokens that followed (N,). Out: of the student one number per token
of each kind, differentiable in hidden states and weight; of teachers the log-probs of all their ids for the rows of a
chunk, or of the drawn tokens and the likeliest ids alone. The logits (N, V) never exist as a whole: with V = 176,384
those of 24,000 tokens are 17 GB. Rows are taken in chunks; the backward pass computes a chunk's logits again.

Not here: forward passes, which positions are scored, masks, losses.

Letters: N positions, D hidden size, V rows of the head, K <= V ids in the softmax, C rows of a chunk; of teachers
T <= V ids, B those that a base teacher knows, E the others, K likeliest ids.

With s = hidden @ weight[:K].T / temperature, p = softmax(s) and y the token that followed:

    log_prob = s_y - logsumexp(s)              d/ds_j = 1[j = y] - p_j
    entropy  = -sum_j p_j log p_j              d/ds_j = -p_j (log p_j + entropy)
    mass     = sum_{j >= extend_start} p_j     a measurement, without gradient
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from verl.vocabulary import Vocabulary

CHUNK_BYTES, MOST_CUDA_CHUNK_BYTES = 384 * 2**20, 4 * 2**30
"""All buffers of one chunk together take at most the first on CPU; on CUDA at least the first, at most the second."""
LEAST_ROWS, CPU_BUFFERS = 256, 4
"""On CPU: rows from which products are fast, where memory allows them; (C, K) buffers of a whole chunk: the student's,
those of two teachers, and one of half precision. Element-wise passes take a chunk in blocks of rows."""
CACHED_BYTES = 2**20
"""Size of one buffer of a block on CPU: passes over more wait for memory."""
BUFFERS = 4
"""(C, K) buffers that live at once here, of which one may be of another dtype; of (C, T) where a teacher scores."""
ALIGNED_ROWS = 64
"""Heads are multiplied in multiples of so many rows: logits in rows of an odd length are slow to write and to read."""


def row_chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """The rows of each chunk in turn."""
    return (slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows))


def rows_per_chunk(chunk_bytes: int | None, buffers: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows whose buffers together take ``chunk_bytes``; None: as many as are fast on the device."""
    if chunk_bytes is None and device.type == "cpu":
        rows = max(LEAST_ROWS, CACHED_BYTES // bytes_per_row)
        return max(1, min(rows, CHUNK_BYTES // (CPU_BUFFERS * bytes_per_row)))
    if chunk_bytes is None:
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what the allocator caches
        chunk_bytes = max(CHUNK_BYTES, min(MOST_CUDA_CHUNK_BYTES, free // 16))
    return max(1, chunk_bytes // (buffers * bytes_per_row))


Block = tuple[slice, slice, torch.Tensor]
"""Its rows among all N, its rows in the chunk, and a view of the logits there, divided by the temperature."""


def scaled_blocks(logits: torch.Tensor, temperature: float, first: int = 0) -> Iterator[Block]:
    """A chunk (C, K) whose rows begin at ``first``, divided by the temperature in place, in blocks that stay in the
    CPU's cache; in one piece on CUDA."""
    rows = max(1, CACHED_BYTES // (logits.shape[1] * logits.itemsize)) if logits.device.type == "cpu" else len(logits)
    for block in row_chunks(len(logits), rows):
        scores = logits[block] if temperature == 1.0 else logits[block].div_(temperature)
        yield slice(first + block.start, first + block.stop), block, scores


def aligned_rows(weight: torch.Tensor, ids: int) -> int:
    """Rows of a head (V, D) to multiply with for the logits of its first ``ids``; those after them mean nothing."""
    return min(len(weight), -(-ids // ALIGNED_ROWS) * ALIGNED_ROWS)


def multiplies_into_fp32(tensor: torch.Tensor) -> bool:
    """Whether products of such tensors in half precision can come out in float32."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def head_logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(C, rows of ``head``) logits, at least float32; memory of its own, which callers overwrite."""
    if multiplies_into_fp32(hidden):
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    # On CPU a bf16 product is rounded before the cast: a logit near 30 has steps of 0.125.
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_labels(labels: torch.Tensor, ids: int) -> None:
    """Raise ValueError for a label (N,) outside the softmax over ``ids``, which would have another's score, or none."""
    # On CUDA such a label trips an assertion inside `gather`, after which the process cannot use its GPU.
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < ids:
        raise ValueError(f"labels go up to {int(labels.max())}; the softmax is over ids from 0 to below {ids}")


# ------------------------------------------------------------------ the student


class TokenStats(NamedTuple):
    """Statistics of N tokens; float32 (float64 for float64 inputs), in nats where it is a logarithm."""

    log_probs: torch.Tensor
    """(N,) log-prob of the token."""
    entropy: torch.Tensor | None
    """(N,) entropy of the distribution it was drawn from; None without ``with_entropy``."""
    extend_mass: torch.Tensor | None
    """(N,) probability of all extended ids, without gradient; None for a vocabulary without extension."""


class _Options(NamedTuple):
    temperature: float
    ids: int
    extend_start: int | None
    with_entropy: bool
    chunk_rows: int


class InputGradients:
    """Gradients of a loss in hidden states (N, D) and head (V, D), from those in the logits, chunk by chunk.

    In half precision a sum over dozens of chunks would lose the small ones, so that of the head is kept in float32 and
    rounded once.

    Args:
        ids: K.
        needed: whether each of the two is.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, ids: int, needed: Sequence[bool]) -> None:
        self._of_hidden = torch.empty_like(hidden) if needed[0] else None  # every row is written, by one chunk
        exact = torch.promote_types(weight.dtype, torch.float32)
        self._of_weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None  # rows from K on stay 0
        rows = aligned_rows(weight, ids)
        # The rows from K on are multiplied with gradients of 0, and 0 times infinity is NaN.
        self._hidden, self._ids, self._dtype = hidden, ids, weight.dtype
        self.head = weight[: rows if weight[ids:rows].isfinite().all() else ids]
        """(K, D) and the rows that are multiplied with it."""

    def buffer_for(self, logits: torch.Tensor) -> torch.Tensor:
        """(C, rows of ``head``) for the gradient in the logits, those themselves where precisions are one."""
        grad = logits if logits.dtype == self._dtype else torch.empty_like(logits, dtype=self._dtype)
        grad[:, self._ids :] = 0
        return grad

    def add(self, chunk: slice, grad: torch.Tensor) -> None:
        """``grad`` is that of the chunk's logits, as of `buffer_for`."""
        if self._of_hidden is not None:
            torch.mm(grad, self.head, out=self._of_hidden[chunk])
        if self._of_weight is not None:
            add_product(self._of_weight[: grad.shape[1]], grad, self._hidden[chunk])

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden states and head; None where not needed."""
        return self._of_hidden, None if self._of_weight is None else self._of_weight.to(self._dtype)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left.T @ right`` to ``total`` (K, D), which is float32 where these are of half precision."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif multiplies_into_fp32(left):
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    else:
        # The product is a tensor of its own first; a part of it stays in the cache until it is added.
        for rows in row_chunks(len(total), max(1, CACHED_BYTES // total[0].nbytes)):
            total[rows] += left[:, rows].T @ right


class _LinearTokenStats(torch.autograd.Function):
    """Forward and backward in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        # An output that the loss leaves out then has None as gradient, and backward skips its part.
        ctx.set_materialize_grads(False)
        rows = hidden.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(rows, dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(log_probs) if options.with_entropy else None
        mass = None if options.extend_start is None else torch.empty_like(log_probs)
        head = weight[: aligned_rows(weight, options.ids)]
        for chunk in row_chunks(rows, options.chunk_rows):
            logits = head_logits(hidden[chunk], head)
            for at, _, scores in scaled_blocks(logits[:, : options.ids], options.temperature, chunk.start):
                log_softmax = scores.log_softmax(dim=-1)
                log_probs[at] = log_softmax.gather(1, labels[at, None]).squeeze(1)
                if mass is not None:
                    mass[at] = log_softmax[:, options.extend_start :].exp().sum(dim=-1)
                if entropy is not None:
                    entropy[at] = torch.linalg.vecdot(log_softmax.exp(), log_softmax).neg_()
            del logits, scores, log_softmax  # before the next chunk makes its own
        ctx.options = options
        ctx.save_for_backward(hidden, weight, labels, entropy)
        if mass is not None:
            ctx.mark_non_differentiable(mass)
        return log_probs, entropy, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, labels, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(len(hidden), dtype=entropy.dtype, device=hidden.device)
        gradients = InputGradients(hidden, weight, options.ids, ctx.needs_input_grad)
        for chunk in row_chunks(hidden.shape[0], options.chunk_rows):
            logits = head_logits(hidden[chunk], gradients.head)
            into = gradients.buffer_for(logits)
            for at, block, scores in scaled_blocks(logits[:, : options.ids], options.temperature, chunk.start):
                log_softmax = scores.log_softmax(dim=-1)
                # Both terms but 1[j = y] have the factor p_j, so the others' coefficients are summed first.
                grad, coefficient = log_softmax.exp(), -grad_log_probs[at, None]
                if grad_entropy is not None:
                    log_softmax.add_(entropy[at, None]).mul_(-grad_entropy[at, None])
                    coefficient = log_softmax.add_(coefficient)
                # The term 1[j = y]. The gradient is in s, the product over the temperature: hence one more division.
                of_labels = grad_log_probs[at, None].to(grad.dtype)
                grad = grad.mul_(coefficient).scatter_add_(1, labels[at, None], of_labels).div_(options.temperature)
                into[block, : options.ids] = grad
            gradients.add(chunk, into)
            del logits, into, scores, log_softmax, grad, coefficient  # before the next chunk makes its own
        return *gradients.result(), None, None


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> TokenStats:
    """Score tokens under ``softmax(hidden @ weight[:K].T / temperature)``.

    Args:
        hidden: (N, D) hidden states at the positions that predict the tokens; N = 0 is fine.
        weight: (V, D) of the lm head, of the same dtype.
        labels: (N,) int64 ids of the tokens, below K.
        temperature: divides the logits.
        vocabulary: its ``ids`` are K, its extended ids count for ``extend_mass``; None: K = V, no ``extend_mass``.
        with_entropy: compute the entropy too.
        chunk_bytes: memory for the buffers of a chunk; changes memory and speed, not the result.

    Returns:
        `TokenStats`, every tensor (N,).

    Raises:
        ValueError: a label outside the softmax, or more ids than rows.
    """
    vocabulary = vocabulary or Vocabulary(weight.shape[0])
    vocabulary.check_head(weight.shape[0])
    ids = vocabulary.ids
    check_labels(labels, ids)
    # An extension that begins past the last id has an empty sum as its mass, and empty slices.
    start = None if vocabulary.extend_start is None else vocabulary.shared_ids()
    bytes_per_row = ids * torch.promote_types(weight.dtype, torch.float32).itemsize
    rows = rows_per_chunk(chunk_bytes, BUFFERS, bytes_per_row, hidden.device)
    options = _Options(temperature, ids, start, with_entropy, rows)
    return TokenStats(*_LinearTokenStats.apply(hidden, weight, labels, options))


# ------------------------------------------------------------------ teachers


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
        rest = log_p[:, : self.vocab_size].scatter(1, self.ids, -torch.inf).logsumexp(dim=-1)
        # Elsewhere q = p x teacher's rest / student's rest, in logs; a student's rest of 0 has nothing to scale.
        ratio = torch.where(rest > -torch.inf, rest - self.rest.clamp(min=least), 0.0)
        log_q = log_p[:, : self.vocab_size] - ratio[:, None]
        return log_q.scatter_(1, self.ids, self.log_probs.to(log_q.dtype))


TeacherLogProbs = Callable[[slice], torch.Tensor | TopLogProbs]
"""Rows of the positions -> (C, T) log-probs of the first T ids, in memory of its own, which callers overwrite; or the
likeliest ids alone."""


class LinearLogProbs:
    """Log-probs of a frozen head's first ids: ``log_softmax(hidden @ weight[:vocab_size].T / temperature)``."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, temperature: float = 1.0) -> None:
        Vocabulary(vocab_size).check_head(weight.shape[0])
        self.vocab_size = vocab_size
        self.hidden_states = (hidden,)
        """(N, D) of each model, the base teacher's first."""
        self._weight, self._temperature = weight[: aligned_rows(weight, vocab_size)], temperature

    def __call__(self, rows: slice) -> torch.Tensor:
        logits = head_logits(self.hidden_states[0][rows], self._weight)[:, : self.vocab_size]
        for _, _, scores in scaled_blocks(logits, self._temperature):
            scores.copy_(scores.log_softmax(dim=-1))
        return logits


class StitchedLogProbs:
    """One teacher on B, another on E: a proper distribution over all ids of the second.

    With d the mass that ``own``, which knows all ids, gives E at a position::

        q(v) = (1 - d) q_base(v)                for v in B
        q(v) = d q_own(v | E) = q_own(v)        for v in E

    Args:
        base: knows B alone.
        own: knows all ids.
    """

    def __init__(self, base: LinearLogProbs, own: LinearLogProbs) -> None:
        self.vocab_size = own.vocab_size
        self.hidden_states: tuple[torch.Tensor, ...] = (*base.hidden_states, *own.hidden_states)
        self._base, self._own = base, own

    def __call__(self, rows: slice) -> torch.Tensor:
        log_q = self._own(rows)
        shared = log_q[:, : self._base.vocab_size]  # a view, overwritten below
        outside = shared.logsumexp(dim=-1, keepdim=True)  # log(1 - d), exact where d is nearly 1
        shared.copy_(self._base(rows)).add_(outside)
        return log_q


FullLogProbs = LinearLogProbs | StitchedLogProbs
"""Teachers whose whole distributions are known."""


def score_tokens(
    teacher: FullLogProbs, labels: torch.Tensor, missing: float, topk: int | None = None, chunk_bytes: int | None = None
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
    chunk_rows = rows_per_chunk(chunk_bytes, BUFFERS, size * torch.float32.itemsize, labels.device)
    for rows in row_chunks(len(labels), chunk_rows):
        log_q = teacher(rows)
        values = log_q.gather(1, chosen[rows]).squeeze(1)
        drawn[rows] = values.where(known[rows], missing).to(drawn.dtype)
        if top is not None:
            likeliest, ids = log_q[:, :size].topk(min(topk or 0, size), dim=-1)
            for found, target in ((ids, top.ids[rows]), (likeliest, top.log_probs[rows])):
                target[:, : found.shape[1]] = found
                target[:, found.shape[1] :] = found[:, :1]
            # As a sum over the others: one less the mass of the likeliest would be rounding where that is nearly all.
            top.rest[rows] = log_q.scatter_(1, ids, -torch.inf).logsumexp(dim=-1)
        del log_q  # before the next chunk makes its own
    return drawn, top

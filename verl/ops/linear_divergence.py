"""Exact divergence of a student from a teacher, straight from hidden states and lm heads, gradients with it.

In:  the student's hidden states (N, D) and head (V, D), the teacher's log-probs at the same positions, a weight per
position. Out: one scalar to minimise, and statistics per position. The logits (N, V) never exist as a whole: rows are
taken in chunks, and a chunk's gradient is taken while its logits are there, so that nothing is computed twice.

Not here: which positions are trained, how their loss is normalised, who the teacher of a row is.

Letters: N positions, D hidden size, V rows of the head, K <= V ids of the student's softmax, of which those below
``extend_start`` are B, which the teacher knows, and the others E; S the support, B or all K; C rows of a chunk.

With s the student's logits over the temperature, p = softmax of s over S, q the teacher's distribution over S:

    reverse_kl   div = sum_S p a,  a = log p - log q                         d/ds_j = p_j (a_j - div)
    forward_kl   div = sum_S q (log q - log p)                               d/ds_j = p_j - q_j
    jsd          div = beta KL(q | m) + (1 - beta) KL(p | m), m = beta q + (1 - beta) p, a = log p - log m
                                                                             d/ds_j = (1 - beta) p_j (a_j - KL(p | m))

and with eps the student's mass on E and delta the mass it should have there (Bernoulli KL, forward form):

    leak = delta log(delta / eps) + (1 - delta) log((1 - delta) / (1 - eps))
    d/ds_j = P_j - delta p(j | E)  for j in E,   P_j - (1 - delta) p(j | B)  for j in B,   P softmax of s over all K

Where only the teacher's likeliest ids are known, its other ids are one bucket for both models: their mass is spread as
the student spreads its own, which changes no formula (`TopLogProbs.completed`). The divergence is then a lower bound
of the whole one, by the log-sum inequality.

The generalised Jensen-Shannon divergence is that of Agarwal et al., "On-Policy Distillation of Language Models"
(2024): beta near 0 behaves as reverse, near 1 as forward KL.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from verl.ops.linear_log_prob import (
    InputGradients,
    TeacherLogProbs,
    TopLogProbs,
    check_labels,
    row_chunks,
    rows_per_chunk,
    scaled_logits,
)
from verl.vocabulary import Vocabulary

REVERSE_KL, FORWARD_KL, JSD = "reverse_kl", "forward_kl", "jsd"
DIVERGENCES = (REVERSE_KL, FORWARD_KL, JSD)
SHARED, FULL = "shared", "full"
BUFFERS = 9
"""(C, K) buffers of the logits' precision that live at once, in ``jsd`` over all ids with a leak term."""


@dataclass(frozen=True)
class DivergenceOptions:
    """What is minimised."""

    kind: str = REVERSE_KL
    """One of DIVERGENCES."""
    beta: float = 0.5
    """Of ``jsd``, strictly between 0 and 1."""
    support: str = SHARED
    """``shared``: p over B alone, so that mass on E neither counts nor moves. ``full``: p over all ids."""
    temperature: float = 1.0
    """Of the student's softmax."""
    missing_log_prob: float = -100.0
    """Log-prob in ``reverse_kl`` of an id that the teacher gives no probability, such as one of E that it lacks; the
    other divergences take the probability 0. Also the smallest log of the mass outside a teacher's likeliest ids."""
    leak_coef: float = 0.0
    """Weight of the leak term."""
    leak_target: float = 1e-4
    """delta of the leak term, strictly between 0 and 1."""


class DivergenceStats(NamedTuple):
    """Statistics of N positions, without gradient; float32, or float64 for float64 inputs."""

    divergence: torch.Tensor
    """(N,) div, nats."""
    leak: torch.Tensor
    """(N,) the leak term before its weight, nats; 0 without E."""
    log_prob: torch.Tensor
    """(N,) the student's log-prob of the drawn token, over all K, nats."""
    entropy: torch.Tensor
    """(N,) of the student over all K, nats."""
    extend_mass: torch.Tensor
    """(N,) eps; 0 without E."""
    sampled: torch.Tensor
    """(N,) log p(y) - log q(y) of the drawn token y, over S: an estimate of div where tokens are drawn from p; 0 for a
    token outside S."""
    teacher_log_prob: torch.Tensor
    """(N,) log q(y) of the drawn token, over all ids that the teacher knows; ``missing_log_prob`` where it lacks y.
    From likeliest ids alone it is as exact as they are."""


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_weights: torch.Tensor,
    teacher: TeacherLogProbs,
    options: DivergenceOptions,
    labels: torch.Tensor,
    vocabulary: Vocabulary | None = None,
    *,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, DivergenceStats]:
    """``sum_n token_weights[n] (div_n + leak_coef leak_n)``, differentiable in ``hidden`` and ``weight``.

    Args:
        hidden: (N, D) of the student, at the positions that predict the tokens; N = 0 is fine.
        weight: (V, D) of its head, of the same dtype.
        token_weights: (N,) of the positions; 0 leaves one out.
        teacher: log-probs of its ids, all or the likeliest; of B, or of all K.
        options: what is minimised.
        labels: (N,) int64, the tokens that were drawn, for the statistics alone.
        vocabulary: of the student: K and E; None: all rows, no E.
        chunk_bytes: memory for the buffers of a chunk; changes memory and speed, not the result.

    Raises:
        ValueError: sizes that do not fit each other, or a label outside K.
    """
    vocabulary = vocabulary or Vocabulary(weight.shape[0])
    vocabulary.check_head(weight.shape[0])
    check_labels(labels, vocabulary.ids)
    bytes_per_row = vocabulary.ids * torch.promote_types(weight.dtype, torch.float32).itemsize
    chunk_rows = rows_per_chunk(chunk_bytes, BUFFERS, bytes_per_row, hidden.device)
    job = _Job(options, vocabulary.ids, vocabulary.shared_ids(), labels, chunk_rows)
    loss, *stats = _LinearDivergence.apply(hidden, weight, token_weights, teacher, job)
    return loss, DivergenceStats(*stats)


class _Job(NamedTuple):
    options: DivergenceOptions
    ids: int
    """K."""
    start: int
    """Size of B; K without E."""
    labels: torch.Tensor
    chunk_rows: int


class _LinearDivergence(torch.autograd.Function):
    """The gradient is taken in the forward pass; backward only multiplies it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, token_weights: torch.Tensor, teacher: Any, job: _Job
    ) -> tuple[torch.Tensor, ...]:
        rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        # (fields, N): iterating a tensor gives its rows, so each field is a view (N,) of one buffer.
        stats = DivergenceStats(*torch.zeros(len(DivergenceStats._fields), rows, dtype=dtype, device=hidden.device))
        gradients, head = InputGradients(hidden, weight, ctx.needs_input_grad), weight[: job.ids]
        for chunk in row_chunks(rows, job.chunk_rows):
            logits = scaled_logits(hidden[chunk], head, job.options.temperature)
            measured, grad = _chunk(logits, teacher(chunk), job.labels[chunk, None], job)
            for values, into in zip(measured, stats, strict=True):
                into[chunk] = values
            if any(ctx.needs_input_grad):
                # The gradient is in s, the product over the temperature: hence one more division.
                grad = grad.mul_(token_weights[chunk, None] / job.options.temperature).to(weight.dtype)
                grad.masked_fill_(token_weights[chunk, None] == 0, 0.0)  # 0 times an infinite slope is NaN
                gradients.add(chunk, grad)
            del logits, grad  # before the next chunk makes its own
        losses = token_weights * (stats.divergence + job.options.leak_coef * stats.leak)
        loss = torch.where(token_weights == 0, 0.0, losses).sum()  # where a weight is 0, NaN and infinity included
        ctx.save_for_backward(*gradients.result())
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # In place: nobody else holds these, and the head's is large.
        scaled = (None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in ctx.saved_tensors)
        return *scaled, None, None, None


def _chunk(
    logits: torch.Tensor, teacher: torch.Tensor | TopLogProbs, labels: torch.Tensor, job: _Job
) -> tuple[DivergenceStats, torch.Tensor]:
    """Statistics (C,) of a chunk and its gradient in the logits (C, K), unit weight; overwrites the first two inputs.

    ``labels`` is (C, 1).
    """
    options, start = job.options, job.start
    support = start if options.support == SHARED else job.ids
    known = teacher.vocab_size if isinstance(teacher, TopLogProbs) else teacher.shape[1]
    if known != start and known < job.ids:
        raise ValueError(f"the teacher scores {known} ids, not {start} or {job.ids}: check extend_vocab_start_token")
    base = logits[:, :start].logsumexp(dim=-1)
    extended = logits[:, start:].logsumexp(dim=-1)  # -inf where E is empty
    # The sums over B and E add up to that over all ids: no third pass over (C, K).
    whole = torch.logaddexp(base, extended)
    log_prob = _pick(logits, labels, 0.0) - whole
    of_extended = _entropy(logits[:, start:] - extended[:, None]) if support < job.ids else None

    grad = torch.zeros_like(logits)
    leak = torch.zeros_like(base)
    if start < job.ids:
        leak = _leak(logits, base, extended, grad, job)  # before `log_p`, which takes the logits' memory
    log_p = logits[:, :support].sub_((base if support == start else whole)[:, None])
    if isinstance(teacher, TopLogProbs):
        teacher = teacher.completed(log_p, options.missing_log_prob)
    # The order matters: `_on_support` overwrites the teacher's log-probs, `_divergence` overwrites `log_q`.
    teacher_log_prob = _pick(teacher, labels, options.missing_log_prob)
    log_q = _on_support(teacher, support, options)
    if options.kind == REVERSE_KL:  # an id that the teacher rules out costs as much as one that it lacks
        log_q.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=options.missing_log_prob)
    sampled = _pick(log_p, labels, 0.0) - _pick(log_q, labels, 0.0)
    p, mass = log_p.exp(), (extended - whole).exp()
    entropy = _entropy(log_p, p)
    if of_extended is not None:  # entropy of which part it is, and the mean of those within the parts
        outside = base - whole
        within = torch.where(mass > 0, mass * (of_extended - (extended - whole)), 0.0)
        entropy = outside.exp() * (entropy - outside) + within
    divergence, of_divergence = _divergence(log_p, p, log_q, options)
    grad[:, :support].add_(of_divergence)
    return DivergenceStats(divergence, leak, log_prob, entropy, mass, sampled, teacher_log_prob), grad


def _entropy(log_p: torch.Tensor, p: torch.Tensor | None = None) -> torch.Tensor:
    """(C,) of the distributions with these log-probs (C, S), nats."""
    return -torch.linalg.vecdot(log_p.exp() if p is None else p, log_p)


def _pick(values: torch.Tensor, labels: torch.Tensor, missing: float) -> torch.Tensor:
    """(C,) values (C, T) at the labels (C, 1); ``missing`` for a label from T on."""
    known = labels < values.shape[1]
    # An unknown label looks up id 0, because gather takes no id outside; `missing` replaces what it finds.
    return torch.where(known, values.gather(1, labels.where(known, 0)), missing).squeeze(1)


def _on_support(teacher: torch.Tensor, support: int, options: DivergenceOptions) -> torch.Tensor:
    """The teacher's log-probs over S (C, S)."""
    known = teacher.shape[1]
    if known < support:  # it knows nothing of E
        # The reverse KL is infinite where q is 0, so it takes a finite log; the others stay finite there.
        missing = options.missing_log_prob if options.kind == REVERSE_KL else -torch.inf
        return torch.nn.functional.pad(teacher, (0, support - known), value=missing)
    if known > support:  # it knows E too, and B alone is compared
        teacher = teacher[:, :support]
        return teacher.sub_(teacher.logsumexp(dim=-1, keepdim=True))
    return teacher


def _divergence(
    log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor, options: DivergenceOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """div (C,), and its gradient in the logits of S (C, S). Overwrites ``p`` and ``log_q``."""
    if options.kind == FORWARD_KL:
        q = log_q.exp()
        # Nothing is divided by p, which may underflow where q has not: the gradient is p - q.
        value = torch.where(q > 0, q.mul(log_q.sub_(log_p)), 0.0).sum(dim=-1)  # 0 times -inf is NaN
        return value, p.sub_(q)
    if options.kind == REVERSE_KL:
        slope = log_q.neg_().add_(log_p)
        value = torch.linalg.vecdot(p, slope)
        return value, p.mul_(slope.sub_(value[:, None]))
    if options.kind != JSD:
        raise ValueError(f"there is no divergence {options.kind!r}; use one of {', '.join(DIVERGENCES)}")
    beta, q = options.beta, log_q.exp()
    log_m = torch.lerp(p, q, beta).log_()  # m = p + beta (q - p)
    # Where q is the smallest there is, the mixture may underflow though q has not.
    of_teacher = torch.where((q > 0) & log_m.isfinite(), q.mul_(log_q.sub_(log_m)), 0.0).sum(dim=-1)
    # Where p and m underflow, log m is -inf, and p times the infinite slope would be NaN.
    slope = torch.where(p > 0, torch.sub(log_p, log_m, out=log_m), 0.0)
    of_student = torch.linalg.vecdot(p, slope)
    gradient = p.mul_(slope.sub_(of_student[:, None])).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student, gradient


def _leak(
    logits: torch.Tensor, base: torch.Tensor, extended: torch.Tensor, grad: torch.Tensor, job: _Job
) -> torch.Tensor:
    """The leak term (C,); its weighted gradient goes to ``grad``. ``base`` and ``extended`` normalise B and E (C,)."""
    options, start, whole = job.options, job.start, torch.logaddexp(base, extended)
    delta = options.leak_target
    log_outside, log_inside = base - whole, extended - whole  # log(1 - eps) and log(eps), (C,)
    value = delta * (math.log(delta) - log_inside) + (1 - delta) * (math.log1p(-delta) - log_outside)
    if options.leak_coef:
        # P_j - share p(j | part) = (1 - share / mass of the part) P_j, as exponentials so that no mass is divided by.
        for part, of_part, share in ((slice(0, start), base, 1 - delta), (slice(start, None), extended, delta)):
            inside = (logits[:, part] - of_part[:, None]).exp_()
            factor = (of_part - whole).exp() - share
            grad[:, part] = inside.mul_(options.leak_coef * factor[:, None])
    return value

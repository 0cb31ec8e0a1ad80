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
(2024): with beta near 0 its gradient is beta times that of the forward KL, near 1 it is (1 - beta) times that of the
reverse KL.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from verl.ops.linear_log_prob import (
    InputGradients,
    TeacherLogProbs,
    TopLogProbs,
    check_labels,
    head_logits,
    row_chunks,
    rows_per_chunk,
    scaled_blocks,
)
from verl.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

REVERSE_KL, FORWARD_KL, JSD = "reverse_kl", "forward_kl", "jsd"
DIVERGENCES = (REVERSE_KL, FORWARD_KL, JSD)
SHARED, FULL = "shared", "full"
NEVER = -1e4
"""A log-prob that is finite, and whose probability is 0."""
BUFFERS = 9
"""(C, K) buffers of the logits' precision that live at once, in ``jsd`` over all ids with a leak term. On CPU most of
them exist for one block of rows at a time."""


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
    """(N,) the leak term before its weight, nats; 0 without E or without a weight."""
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
    With likeliest ids alone, a token outside them gets the student's log-prob, shifted so that all of them
    together have the teacher's mass: an estimate."""


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
        ValueError: sizes that do not fit each other, a label outside K, or an unknown divergence.
    """
    if options.kind not in DIVERGENCES:
        raise ValueError(f"there is no divergence {options.kind!r}; use one of {', '.join(DIVERGENCES)}")
    vocabulary = vocabulary or Vocabulary(weight.shape[0])
    vocabulary.check_head(weight.shape[0])
    check_labels(labels, vocabulary.ids)
    bytes_per_row = vocabulary.ids * torch.promote_types(weight.dtype, torch.float32).itemsize
    chunk_rows = rows_per_chunk(chunk_bytes, BUFFERS, bytes_per_row, hidden.device)
    job = _Job(options, vocabulary.ids, vocabulary.shared_ids(), bool((token_weights == 0).any()))
    loss, *stats = _LinearDivergence.apply(hidden, weight, token_weights, labels, teacher, job, chunk_rows)
    return loss, DivergenceStats(*stats)


class _Job(NamedTuple):
    options: DivergenceOptions
    ids: int
    """K."""
    start: int
    """Size of B; K without E."""
    leaves_out: bool
    """Whether a position has the weight 0."""


class _LinearDivergence(torch.autograd.Function):
    """The gradient is taken in the forward pass; backward only multiplies it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        token_weights: torch.Tensor,
        labels: torch.Tensor,
        teacher: Any,
        job: _Job,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, ...]:
        rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        # (fields, N): iterating a tensor gives its rows, so each field is a view (N,) of one buffer.
        stats = DivergenceStats(*torch.zeros(len(DivergenceStats._fields), rows, dtype=dtype, device=hidden.device))
        gradients = InputGradients(hidden, weight, job.ids, ctx.needs_input_grad)
        for chunk in row_chunks(rows, chunk_rows):
            logits = head_logits(hidden[chunk], gradients.head)
            of_teacher, grad = teacher(chunk), gradients.buffer_for(logits)
            known = of_teacher.vocab_size if isinstance(of_teacher, TopLogProbs) else of_teacher.shape[1]
            if known != job.start and known < job.ids:
                fix = "check extend_vocab_start_token"
                raise ValueError(f"the teacher scores {known} ids, not {job.start} or {job.ids}: {fix}")
            for at, block, scores in scaled_blocks(logits[:, : job.ids], job.options.temperature, chunk.start):
                part = of_teacher.rows(block) if isinstance(of_teacher, TopLogProbs) else of_teacher[block]
                columns = labels[at, None], token_weights[at, None]
                measured = _run_block(scores, part, *columns, grad[block, : job.ids], job)
                for values, into in zip(measured, stats, strict=True):
                    into[at] = values
            if any(ctx.needs_input_grad):
                gradients.add(chunk, grad)
            del logits, of_teacher, grad, scores, part  # before the next chunk makes its own
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
        return *scaled, None, None, None, None, None


@cache
def _compiled_block() -> Callable[..., DivergenceStats]:
    # Fused, the passes read and write a number a few times, not dozens of times.
    return torch.compile(_block, dynamic=False)


_compiler_errors: list[Exception] = []
"""Of this process; with one of them it compiles no more."""


def _compiles(logits: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether `_block` is compiled for these: on CUDA, in half precision, where ``grad`` is memory of its own."""
    return logits.is_cuda and grad.dtype != logits.dtype


def _run_block(
    logits: torch.Tensor,
    teacher: torch.Tensor | TopLogProbs,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    grad: torch.Tensor,
    job: _Job,
) -> DivergenceStats:
    """`_block`, compiled where that pays and works."""
    if _compiles(logits, grad) and not _compiler_errors:
        of_teacher = teacher[:3] if isinstance(teacher, TopLogProbs) else (teacher,)
        for tensor in (logits, *of_teacher, labels, token_weights, grad):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # chunks differ in their rows alone, and are compiled once
        try:
            return _compiled_block()(logits, teacher, labels, token_weights, grad, job)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it may have written to ``grad``, and to nothing else
            _compiler_errors.append(error)
            fix = "install a C compiler and Python's headers (deploy_env.sh --device cuda looks for them)"
            logger.warning("exact divergences run slower, because they cannot be compiled (%s); %s", error, fix)
    return _block(logits, teacher, labels, token_weights, grad, job)


def _block(
    logits: torch.Tensor,
    teacher: torch.Tensor | TopLogProbs,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    grad: torch.Tensor,
    job: _Job,
) -> DivergenceStats:
    """Statistics (C,) of a block of rows; its gradient in the logits goes to ``grad`` (C, K), which may be these.

    ``labels`` and ``token_weights`` are (C, 1). On CPU a masked select over (C, K) costs as much as exp, so there is
    only one, where rows of weight 0 need it.
    """
    options, ids, start = job.options, job.ids, job.start
    support = start if options.support == SHARED else ids
    has_leak = options.leak_coef != 0 and start < ids
    log_p = logits[:, :support].log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -torch.linalg.vecdot(p, log_p)
    mass, log_prob = p[:, start:].sum(dim=-1), _pick(log_p, labels, 0.0)
    if support < ids or has_leak:
        # Over B alone, what the softmax took off any logit is the sum's logarithm.
        base = logits[:, :start].logsumexp(dim=-1) if support == ids else logits[:, 0] - log_p[:, 0]
        extended = logits[:, start:].logsumexp(dim=-1)
        whole = torch.logaddexp(base, extended)
    if support < ids:  # entropy of which part it is, and the mean of those within the parts
        outside, inside = base - whole, extended - whole
        mass, log_prob = inside.exp(), _pick(logits, labels, 0.0) - whole
        log_e = logits[:, start:] - extended[:, None]
        within = torch.where(mass > 0, mass * (-torch.linalg.vecdot(log_e.exp(), log_e) - inside), 0.0)
        entropy = outside.exp() * (entropy - outside) + within
    leak, leak_grad = _leak(logits, base, extended, job) if has_leak else (torch.zeros_like(mass), None)

    if isinstance(teacher, TopLogProbs):
        teacher = teacher.completed(log_p, options.missing_log_prob)
    teacher_log_prob = _pick(teacher, labels, options.missing_log_prob)
    log_q, missing = teacher, -torch.inf
    if log_q.shape[1] > support:  # it knows E too, and B alone is compared
        log_q = log_q[:, :support].log_softmax(dim=-1)
    if options.kind == REVERSE_KL:  # an id that the teacher rules out costs as much as one that it lacks
        missing = options.missing_log_prob
        log_q = log_q.nan_to_num(nan=math.nan, posinf=math.inf, neginf=missing)
    sampled = _pick(log_p, labels, 0.0) - _pick(log_q, labels, missing if support == ids else 0.0)
    divergence, divergence_grad = _divergence(log_p, p, log_q, options)  # overwrites these

    if leak_grad is not None:
        leak_grad[:, :support].add_(divergence_grad)
        divergence_grad = leak_grad
    if job.leaves_out:
        divergence_grad.masked_fill_(token_weights == 0, 0.0)  # 0 times an infinite slope is NaN
    # The gradient is in s, the product over the temperature: hence one more division.
    grad[:, : divergence_grad.shape[1]] = divergence_grad.mul_(token_weights / options.temperature)
    grad[:, divergence_grad.shape[1] :] = 0.0
    return DivergenceStats(divergence, leak, log_prob, entropy, mass, sampled, teacher_log_prob)


def _pick(values: torch.Tensor, labels: torch.Tensor, missing: float) -> torch.Tensor:
    """(C,) values (C, T) at the labels (C, 1); ``missing`` for a label from T on."""
    known = labels < values.shape[1]
    # An unknown label looks up id 0, because gather takes no id outside; `missing` replaces what it finds.
    return torch.where(known, values.gather(1, labels.where(known, 0)), missing).squeeze(1)


def _divergence(
    log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor, options: DivergenceOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """div (C,), and its gradient in the logits of S (C, S). Overwrites ``log_p`` and ``p``."""
    known = log_q.shape[1]
    if options.kind == REVERSE_KL:
        slope = log_p
        slope[:, :known].sub_(log_q)
        slope[:, known:].sub_(options.missing_log_prob)
        value = torch.linalg.vecdot(p, slope)
        return value, slope.sub_(value[:, None]).mul_(p)
    q, log_q = log_q.exp(), log_q.clamp(min=NEVER)  # 0 times -inf is NaN
    if options.kind == FORWARD_KL:
        value = torch.linalg.vecdot(q, log_q.sub_(log_p[:, :known]))
        p[:, :known].sub_(q)
        return value, p
    beta, mixture = options.beta, p * (1 - options.beta)
    mixture[:, :known].add_(q, alpha=beta)
    # Where both underflow, its logarithm stays finite, because it is multiplied with either.
    log_m = mixture.clamp_(min=torch.finfo(p.dtype).tiny).log_()
    of_teacher = torch.linalg.vecdot(q, log_q.sub_(log_m[:, :known]))
    slope = log_p.sub_(log_m)
    of_student = torch.linalg.vecdot(p, slope)
    gradient = slope.sub_(of_student[:, None]).mul_(p).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student, gradient


def _leak(
    logits: torch.Tensor, base: torch.Tensor, extended: torch.Tensor, job: _Job
) -> tuple[torch.Tensor, torch.Tensor]:
    """The leak term (C,), and its weighted gradient (C, K). ``base`` and ``extended`` normalise B and E (C,)."""
    options, start, gap = job.options, job.start, extended - base
    delta, grad = options.leak_target, torch.empty_like(logits)
    # log(1 - eps) and log(eps), (C,). In fp32 a difference of two normalisers has an error of the size of delta.
    log_outside, log_inside = logsigmoid(-gap), logsigmoid(gap)
    value = delta * (math.log(delta) - log_inside) + (1 - delta) * (math.log1p(-delta) - log_outside)
    # P_j - share p(j | part) = (mass of the part - share) p(j | part), which of B is what it is of E, negated.
    excess = options.leak_coef * (log_inside.exp() - delta)
    for part, of_part, factor in ((slice(0, start), base, -excess), (slice(start, None), extended, excess)):
        inside = (logits[:, part] - of_part[:, None]).exp_()
        grad[:, part] = inside.mul_(factor[:, None])
    return value, grad

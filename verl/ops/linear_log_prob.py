"""Log-prob, entropy and extended-vocabulary mass of tokens, straight from hidden states and the lm head.

In:  hidden states (N, D), head weight (V, D), the tokens that followed (N,). Out: one number per token of each kind,
differentiable in hidden states and weight. The logits (N, V) never exist as a whole: with V = 176,384 those of 24,000
tokens are 17 GB. Rows are taken in chunks; the backward pass computes a chunk's logits again.

Not here: which positions are scored, masks, losses.

Letters: N positions, D hidden size, V rows of the head, K <= V ids in the softmax, C rows of a chunk.

With s = hidden @ weight[:K].T / temperature, p = softmax(s) and y the token that followed:

    log_prob = s_y - logsumexp(s)              d/ds_j = 1[j = y] - p_j
    entropy  = -sum_j p_j log p_j              d/ds_j = -p_j (log p_j + entropy)
    mass     = sum_{j >= extend_start} p_j     a measurement, without gradient
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from verl.vocabulary import Vocabulary

DEFAULT_CHUNK_BYTES = 256 * 2**20
"""Size of one fp32 (C, K) buffer. Two of them live at once, and a third of the weights' dtype if that is another."""


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


def row_chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """The rows of each chunk in turn."""
    return (slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows))


def scaled_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """(C, K) logits over the temperature, at least float32; memory of its own, which callers overwrite."""
    # A bf16 product is rounded before the cast: a logit near 30 has steps of 0.125.
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits.div_(temperature)


class InputGradients:
    """Gradients of a loss in hidden states (N, D) and head (V, D), from those in the logits, chunk by chunk.

    In half precision a sum over dozens of chunks would lose the small ones, so that of the head is kept in float32 and
    rounded once.

    Args:
        needed: whether each of the two is.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needed: Sequence[bool]) -> None:
        self._hidden, self._weight = hidden, weight
        self._of_hidden = torch.empty_like(hidden) if needed[0] else None  # every row is written, by one chunk
        exact = torch.promote_types(weight.dtype, torch.float32)
        self._of_weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None  # rows from K on stay 0

    def add(self, chunk: slice, grad: torch.Tensor) -> None:
        """``grad`` (C, K) is that of the chunk's logits, in the dtype of the head."""
        ids = grad.shape[1]
        if self._of_hidden is not None:
            torch.mm(grad, self._weight[:ids], out=self._of_hidden[chunk])
        if self._of_weight is not None and self._of_weight.dtype == grad.dtype:
            self._of_weight[:ids].addmm_(grad.T, self._hidden[chunk])
        elif self._of_weight is not None:
            # addmm_ takes one dtype: a product in half precision is a (K, D) tensor of its own first.
            self._of_weight[:ids].add_(grad.T @ self._hidden[chunk])

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """That of the hidden states, and that of the head."""
        return self._of_hidden, None if self._of_weight is None else self._of_weight.to(self._weight.dtype)


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
        log_probs, normalizer = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(log_probs) if options.with_entropy else None
        mass = None if options.extend_start is None else torch.empty_like(log_probs)
        head = weight[: options.ids]
        for chunk in row_chunks(rows, options.chunk_rows):
            log_softmax = scaled_logits(hidden[chunk], head, options.temperature)
            normalizer[chunk] = log_softmax.logsumexp(dim=-1)  # with it backward makes the softmax again
            log_softmax.sub_(normalizer[chunk, None])
            log_probs[chunk] = log_softmax.gather(1, labels[chunk, None]).squeeze(1)
            if mass is not None:
                mass[chunk] = log_softmax[:, options.extend_start :].exp().sum(dim=-1)
            if entropy is not None:
                entropy[chunk] = log_softmax.exp().mul_(log_softmax).sum(dim=-1).neg_()
            del log_softmax  # before the next chunk makes its own
        ctx.options = options
        ctx.save_for_backward(hidden, weight, labels, normalizer, entropy)
        if mass is not None:
            ctx.mark_non_differentiable(mass)
        return log_probs, entropy, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, labels, normalizer, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(normalizer)
        gradients, head = InputGradients(hidden, weight, ctx.needs_input_grad), weight[: options.ids]
        for chunk in row_chunks(hidden.shape[0], options.chunk_rows):
            log_softmax = scaled_logits(hidden[chunk], head, options.temperature).sub_(normalizer[chunk, None])
            # Both terms but 1[j = y] have the factor p_j, so the others' coefficients are summed first.
            grad, coefficient = log_softmax.exp(), -grad_log_probs[chunk, None]
            if grad_entropy is not None:
                log_softmax.add_(entropy[chunk, None]).mul_(-grad_entropy[chunk, None])
                coefficient = log_softmax.add_(coefficient)
            # The term 1[j = y]. The gradient is in s, the product over the temperature: hence one more division.
            of_labels = grad_log_probs[chunk, None].to(grad.dtype)
            grad = grad.mul_(coefficient).scatter_add_(1, labels[chunk, None], of_labels).div_(options.temperature)
            gradients.add(chunk, grad.to(weight.dtype))
            del log_softmax, grad, coefficient  # before the next chunk makes its own
        return *gradients.result(), None, None


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
    with_entropy: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> TokenStats:
    """Score tokens under ``softmax(hidden @ weight[:K].T / temperature)``.

    Args:
        hidden: (N, D) hidden states at the positions that predict the tokens; N = 0 is fine.
        weight: (V, D) of the lm head, of the same dtype.
        labels: (N,) int64 ids of the tokens, below K.
        temperature: divides the logits.
        vocabulary: its ``ids`` are K, its extended ids count for ``extend_mass``; None: K = V, no ``extend_mass``.
        with_entropy: compute the entropy too.
        chunk_bytes: size of one buffer of logits; it changes memory and speed, not the result.

    Returns:
        `TokenStats`, every tensor (N,).

    Raises:
        ValueError: a label outside the softmax, or more ids than rows.
    """
    vocabulary = vocabulary or Vocabulary(weight.shape[0])
    vocabulary.check_head(weight.shape[0])
    ids = vocabulary.ids
    # On CUDA such a label trips an assertion inside `gather`, after which the process cannot use its GPU.
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < ids:
        raise ValueError(f"labels go up to {int(labels.max())}; the softmax is over ids from 0 to below {ids}")
    # An extension that begins past the last id has an empty sum as its mass, and empty slices.
    start = None if vocabulary.extend_start is None else vocabulary.shared_ids()
    bytes_per_row = ids * torch.promote_types(weight.dtype, torch.float32).itemsize
    options = _Options(temperature, ids, start, with_entropy, max(1, chunk_bytes // bytes_per_row))
    return TokenStats(*_LinearTokenStats.apply(hidden, weight, labels, options))

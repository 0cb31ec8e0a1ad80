"""A student and three teachers, all random, and divergences of whole distributions."""

import torch

from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.teacher_log_probs import LinearTeacher, StitchedTeacher
from verl.vocabulary import Vocabulary

N, D, V, K, E = 13, 6, 20, 17, 11  # positions, hidden, rows of the head, ids in the softmax, first extended id
TEACHER_ROWS = 14  # three rows past the shared ids, as Qwen3 has
DRAWN = torch.zeros(1, dtype=torch.int64)
"""The token of one position, where its statistics do not matter."""
LEAK = {"leak_coef": 0.7, "leak_target": 0.03}


class Case:
    """Student, base teacher and frozen student, all random."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
        self.base_hidden, self.base_weight = draw(N, 4), draw(TEACHER_ROWS, 4)
        self.frozen_hidden, self.frozen_weight = draw(N, D), draw(V, D)
        self.token_weights = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype)
        self.token_weights[3] = 0.0

    def base(self, temperature: float = 1.0) -> LinearTeacher:
        return LinearTeacher(self.base_hidden, self.base_weight, E, temperature)

    def frozen(self, temperature: float = 1.0) -> LinearTeacher:
        return LinearTeacher(self.frozen_hidden, self.frozen_weight, K, temperature)

    def stitched(self, temperature: float = 1.0) -> StitchedTeacher:
        return StitchedTeacher(self.base(temperature), self.frozen(temperature))

    def loss(self, teacher, options: DivergenceOptions, rows: int = 4, start: int | None = E, labels=None):
        size = self.hidden.dtype.itemsize
        return linear_divergence(
            self.hidden,
            self.weight,
            self.token_weights,
            teacher,
            options,
            DRAWN.expand(len(self.hidden)) if labels is None else labels,
            Vocabulary(K, start),
            chunk_bytes=6 * rows * K * size,
        )


def definition(case: Case, log_q: torch.Tensor, options: DivergenceOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """D and the leak term (N,) from whole distributions; ``log_q`` over B or over all ids."""
    logits = case.hidden @ case.weight[:K].T / options.temperature
    size = E if options.support == "shared" else K
    log_p = logits[:, :size].log_softmax(-1)
    if log_q.shape[1] > size:
        log_q = log_q[:, :size].log_softmax(-1)
    if log_q.shape[1] < size:
        missing = options.missing_log_prob if options.kind == "reverse_kl" else -torch.inf
        log_q = torch.cat([log_q, torch.full((N, size - log_q.shape[1]), missing, dtype=log_q.dtype)], dim=1)
    p, q = log_p.exp(), log_q.exp()
    known = torch.where(q > 0, log_q, 0.0)  # 0 log 0 is 0
    if options.kind == "reverse_kl":
        divergence = (p * (log_p - log_q)).sum(-1)
    elif options.kind == "forward_kl":
        divergence = (q * (known - log_p)).sum(-1)
    else:
        log_m = (options.beta * q + (1 - options.beta) * p).log()
        divergence = options.beta * (q * (known - log_m)).sum(-1) + (1 - options.beta) * (p * (log_p - log_m)).sum(-1)
    eps, delta = logits.softmax(-1)[:, E:].sum(-1), options.leak_target
    leak = delta * (delta / eps).log() + (1 - delta) * ((1 - delta) / (1 - eps)).log()
    return divergence, leak

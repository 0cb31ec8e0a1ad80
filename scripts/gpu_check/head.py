"""Log-probs and divergence from hidden states against dense fp32; time, speed and peak memory of an update's pass.

Losses take hidden states (N, D) and head of the student, those of the teacher, drawn tokens (N,), and the vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from scripts.gpu_check.bench import Bench, apart
from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.linear_log_prob import LinearLogProbs, linear_token_stats
from verl.utils.device import select_device
from verl.vocabulary import Vocabulary

Loss = Callable[..., torch.Tensor]


def sampled(hidden: Any, weight: Any, _: Any, __: Any, labels: torch.Tensor, words: Vocabulary) -> torch.Tensor:
    """Mean log-prob of the tokens."""
    return linear_token_stats(hidden, weight, labels, vocabulary=words).log_probs.mean()


def dense_sampled(hidden: Any, weight: Any, _: Any, __: Any, labels: Any, words: Vocabulary) -> torch.Tensor:
    """The same from fp32 logits."""
    return -F.cross_entropy(hidden.float() @ weight[: words.ids].float().T, labels)


def exact(hidden: Any, weight: Any, states: Any, head: Any, labels: Any, words: Vocabulary) -> torch.Tensor:
    """Mean reverse KL over the teacher's ids, and the leak term."""
    teacher, mean = (
        LinearLogProbs(states, head, words.shared_ids()),
        torch.full_like(labels, 1 / len(labels), dtype=torch.float32),
    )
    return linear_divergence(hidden, weight, mean, teacher, DivergenceOptions(leak_coef=1.0), labels, words)[0]


def dense_exact(hidden: Any, weight: Any, states: Any, head: Any, _: Any, words: Vocabulary) -> torch.Tensor:
    """The same from fp32 logits."""
    start, delta = words.shared_ids(), DivergenceOptions.leak_target
    logits = hidden.float() @ weight[: words.ids].float().T
    log_q = (states.float() @ head[:start].float().T).log_softmax(-1)
    log_p, whole = logits[:, :start].log_softmax(-1), logits.logsumexp(-1)
    log_eps, log_rest = (part.logsumexp(-1) - whole for part in (logits[:, start:], logits[:, :start]))
    leak = delta * (math.log(delta) - log_eps) + (1 - delta) * (math.log1p(-delta) - log_rest)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + leak).mean()


def gradients(loss: Loss, inputs: list[Any], words: Vocabulary) -> list[torch.Tensor]:
    """The loss, and its gradient in the student's hidden states and head."""
    value = loss(*inputs, words)
    return [value.detach(), *torch.autograd.grad(value, inputs[:2])]


def measure(bench: Bench, name: str, loss: Loss, inputs: list[Any], words: Vocabulary) -> None:
    """Time, speed and memory of a pass, forward and backward."""
    if not bench.smoke:
        torch.cuda.reset_peak_memory_stats()
    seconds = min(bench.timed(lambda: gradients(loss, inputs, words))[0] for _ in range(4))
    products = 4 * words.ids if loss is sampled else 3 * words.ids + words.shared_ids()
    speed, bound = 2e-12 * inputs[0].numel() * products / seconds, "" if bench.smoke else ">= 300"
    bench.check(f"{name}, K = {words.ids}: ms", 1e3 * seconds)
    bench.check(f"{name}, K = {words.ids}: TFLOP/s", speed, bound, "estimate for an H100")
    bench.check(f"{name}, K = {words.ids}: GiB at most", bench.gib("max_memory_allocated"), "<= 14", "estimate")


def run(bench: Bench) -> None:
    """See the module."""
    select_device(bench.device, 0)
    torch.manual_seed(0)
    positions, few, size = (256, 16, 64) if bench.smoke else (8192, 64, 4096)
    start, ids, rows, teacher_rows = bench.sizes
    shapes = [(count, size) for count in (positions, rows, positions, teacher_rows)]
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes]
    for number, tensor in enumerate(inputs):
        tensor.mul_((1, 3 / math.sqrt(size))[number % 2]).requires_grad_(number < 2)  # logits of a deviation of 3
    inputs.append(torch.randint(start, (positions,), device=bench.device))
    part = [tensor if len(tensor) > positions else tensor[:few] for tensor in inputs]
    for name, loss, dense, bound in (("sampled", sampled, dense_sampled, 0.01), ("exact", exact, dense_exact, 0.05)):
        with bench.attempt(name):
            words = Vocabulary(ids, start)
            value, *of_inputs = map(apart, gradients(loss, part, words), gradients(dense, part, words))
            bench.check(f"{name}: loss", value, "<= 0.002", "relative; 0.0001 on a CPU, logits in bf16")
            source = "relative; 0.002 (sampled) and 0.016 (exact) on a CPU, logits in bf16"
            bench.check(f"{name}: gradient", max(of_inputs), f"<= {bound}", source)
            for aligned in (words, Vocabulary(ids // 64 * 64, start // 64 * 64)):
                measure(bench, name, loss, inputs, aligned)

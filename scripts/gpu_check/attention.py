"""Packed attention and torch's padded one against fp32; milliseconds of a layer, forward and backward.

Letters as in ``verl.ops.attention``: H query heads, G key heads, N tokens of all rows, d size of a head.
"""

import importlib.util
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from scripts.gpu_check.bench import Bench, apart
from verl.ops.attention import packed_sdpa_attention, packed_varlen_attention
from verl.utils.device import select_device

Tensors = list[torch.Tensor]
"""Queries (1, H, N, d), keys and values (1, G, N, d)."""
Attend = Callable[[Tensors, list[int]], torch.Tensor]
"""With the lengths of the rows -> (1, N, H, d)."""


def draw(bench: Bench, rows: int, mean: int, seed: int) -> tuple[Tensors, list[int], torch.Tensor]:
    """Rows of ``mean`` tokens, some shorter, some longer, and a gradient of their attention."""
    torch.manual_seed(seed)
    lengths = (mean * (0.7 + 0.6 * torch.rand(rows))).long().tolist()
    heads, groups, size = (4, 2, 16) if bench.smoke else (32, 8, 128)
    shapes = [(1, sum(lengths), count, size) for count in (heads, groups, groups)]
    drawn = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for shape in (*shapes, shapes[0])]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in drawn[:3]], lengths, drawn[3]


def packed(function: Callable[..., Any]) -> Attend:
    """One of ours, called as transformers does."""

    def attend(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
        ends = torch.tensor([0, *accumulate(lengths)], device=tensors[0].device, dtype=torch.int32)
        rows = {"row_lengths": tuple(lengths), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return function(None, *tensors, None, max_length_q=max(lengths), max_length_k=max(lengths), **rows)[0]

    return attend


def flash(_: None, *tensors: Any, cu_seq_lens_q: torch.Tensor, max_length_q: int, **__: Any) -> tuple[torch.Tensor]:
    """The package flash-attn, called as ours."""
    from flash_attn import flash_attn_varlen_func

    tokens_first, ends, most = (tensor[0].transpose(0, 1) for tensor in tensors[:3]), cu_seq_lens_q, max_length_q
    return (flash_attn_varlen_func(*tokens_first, ends, ends, most, most, causal=True)[None],)


def padded(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
    """Torch's attention over rows below each other, with padding on their right."""
    tokens_first = (tensor[0].transpose(0, 1).split(lengths) for tensor in tensors)
    q, k, v = (pad_sequence(rows, batch_first=True).transpose(1, 2) for rows in tokens_first)
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(found, lengths, strict=True)])[None]


def reference(tensors: Tensors, lengths: list[int]) -> torch.Tensor:
    """In fp32, with as many key heads as query heads, for which torch has kernels."""
    heads = tensors[0].shape[1]
    return padded([tensor.float().repeat_interleave(heads // tensor.shape[1], 1) for tensor in tensors], lengths)


def step(attend: Attend, tensors: Tensors, lengths: list[int], grad: torch.Tensor) -> Tensors:
    """The result, and the gradients of queries, keys and values."""
    found = attend(tensors, lengths)
    return [found.detach(), *torch.autograd.grad(found, tensors, grad.to(found.dtype))]


def run(bench: Bench) -> None:
    """See the module."""
    select_device(bench.device, 0)
    ways = {"padded": padded, "packed_sdpa": packed(packed_sdpa_attention)}
    if not bench.smoke:
        ways["packed_varlen"] = packed(packed_varlen_attention)
        ways |= {"flash-attn": packed(flash)} if importlib.util.find_spec("flash_attn") else {}
    for rows, mean in ((3, 20), (8, 6)) if bench.smoke else ((12, 2000), (120, 200)):
        cases = [draw(bench, rows, mean, seed) for seed in (0, 0, 1, 2)]
        right = step(reference, *cases[0])
        for name, attend in ways.items():
            label = f"{name}, {rows} x {mean} tokens"
            with bench.attempt(label):
                ms = [1e3 * bench.timed(lambda a=attend, c=case: step(a, *c))[0] for case in cases]
                bench.check(f"{label}: ms, twice the same, two new", ms)
                bench.check(f"{label}: new / same", max(ms[2:]) / ms[1], "<= 3", "estimate: no plan for each length")
                value, *gradients = map(apart, step(attend, *cases[0]), right)
                bench.check(f"{label}: value", value, "<= 0.01", "relative, bf16; 1 where rows mix")
                bench.check(f"{label}: gradient", max(gradients), "<= 0.02", "relative, bf16")

"""Random draws that depend on a seed and a position alone, for whole batches at once.

In:  probabilities of a batch of rows; each row's seed and how many tokens it has drawn. Out: a token per row.

A generator for each row would draw noise for all of its vocabulary, row by row. Here a row has one number in [0, 1),
a hash of seed and position, and its token is the first whose cumulative probability exceeds it (inverse-CDF sampling):
exact, whatever the other rows are.

Letters: N rows, V tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 64
"""Tokens that are summed before the running sum in float64, which over all tokens would cost more than the rest."""


def seeded_uniforms(seeds: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """A number in [0, 1) for each seed and place, both from 0 to below 2^64: (N,) float64."""
    # SplitMix64, whose state is the hashed seed: seeds that differ by its step would otherwise share their numbers.
    state = _mix(np.array(seeds, dtype=np.uint64)) + (np.array(places, dtype=np.uint64) + 1) * 0x9E3779B97F4A7C15
    return torch.from_numpy((_mix(state) >> 12) * 2.0**-52)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


def draw_tokens(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (N,) drawn from probabilities (N, V) with a number in [0, 1 - 2^-52] each, (N,) float64.

    A token with probability 0 is never drawn.
    """
    if missing := -probs.shape[1] % BLOCK:  # padding by nothing would copy too
        probs = F.pad(probs, (0, missing))
    probs = probs.unflatten(1, (-1, BLOCK))
    ends = probs.sum(-1).double().cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]  # rounding may leave a sum that is not 1
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # beyond it where all are NaN
    begin = F.pad(ends, (1, 0)).gather(1, block)
    inside = probs.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(-1)
    # Below the block's own sum, which float64 may round otherwise than `ends`.
    rest = torch.minimum(target - begin, torch.nextafter(inside[:, -1:], inside.new_zeros(())))
    return (block * BLOCK + (inside <= rest).sum(-1, keepdim=True))[:, 0]

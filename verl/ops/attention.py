"""Causal attention over packed rows, for models that get it through transformers' attention interface.

In:  queries, keys and values of rows laid end to end in one sequence, and the rows' lengths. Out: attention in which
no row sees another and no padding is computed. Each row is one call of torch's scaled dot-product attention, so it
runs wherever torch does; with flash-attention installed the model uses that instead (see ``build``).

Not here: sliding windows, soft caps and attention sinks. They are refused, never ignored.

Letters: H query heads, G key heads, N tokens of all rows, d size of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED_SDPA = "packed_sdpa"
"""Name under which models ask for `packed_sdpa_attention`."""

_CHANGES_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


def packed_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Args:
        module: the attention layer (unused; part of the interface).
        query: (B, H, N, d); B is 1 where rows are packed.
        key: (B, G, N, d), with H a multiple of G.
        value: (B, G, N, d).
        attention_mask: must be None: causality within rows is all there is.
        row_lengths: tokens of each packed row, N together; None: every batch entry is one row, padding on its right.

    Returns:
        (B, N, H, d), and None for the attention weights.

    Raises:
        ValueError: the model wants more than causal attention.
    """
    extras = [name for name in _CHANGES_ATTENTION if kwargs.get(name) is not None]
    if extras or attention_mask is not None:
        raise ValueError(f"packed attention knows no {', '.join(extras) or 'mask'}; set model.use_remove_padding=False")

    # Backward of `split` is one `cat`; slices would make zeros of the whole batch for every row.
    parts = [tensor.split(row_lengths or tensor.shape[2], dim=2) for tensor in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    rows = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


# Models with it get no mask, which is what the function expects.
AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention)

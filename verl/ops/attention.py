"""Causal attention over packed rows, for models that get it through transformers' attention interface.

In:  queries, keys and values of rows laid end to end in one sequence, and where the rows end. Out: attention in which
no row sees another and no padding is computed. `packed_sdpa` calls torch's scaled dot-product attention for each row,
so it runs wherever torch does; `packed_varlen` calls torch's flash kernel once for all of them, on CUDA in half
precision. With flash-attention installed the model uses that instead (see ``build``). Both also work on a part of the
tokens, beside other ranks with the rest (``sequence_parallel``).

Not here: sliding windows, soft caps and attention sinks. They are refused, never ignored; `needs_eager` tells where
transformers' own attention has to be taken.

Letters: H query heads, G key heads, N tokens of all rows, d size of a head.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from verl.ops.sequence_parallel import over_heads

PACKED_SDPA, PACKED_VARLEN = "packed_sdpa", "packed_varlen"
"""Names under which models ask for `packed_sdpa_attention` and `packed_varlen_attention`."""

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
    _require_causal(attention_mask, kwargs)
    # Backward of `split` is one `cat`; slices would make zeros of the whole batch for every row.
    parts = [tensor.split(row_lengths or tensor.shape[2], dim=2) for tensor in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    rows = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def packed_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `packed_sdpa_attention`, in one kernel call for all rows; B is 1, without dropout (see ``build.load_config``).

    Args:
        cu_seq_lens_q: int32, 0 and then the end of each row; None: every batch entry is one row.
        max_length_q: tokens of the longest row.
    """
    if cu_seq_lens_q is None:
        return packed_sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    _require_causal(attention_mask, kwargs)
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # (N, H, d) each
    ends, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    grouped = query.shape[1] != key.shape[1]
    causal = (-1, 0)  # all that came before, nothing after
    output: Any = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=causal, enable_gqa=grouped)
    return output[None], None


def needs_eager(config: PretrainedConfig) -> bool:
    """Whether attention has more than torch's kernels: a cap, which transformers drops without a word, or sinks."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # none of a folder's own code
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return capped or not getattr(model_class, "_supports_sdpa", True)


def _require_causal(attention_mask: torch.Tensor | None, options: Mapping[str, Any]) -> None:
    extras = [name for name in _CHANGES_ATTENTION if options.get(name) is not None]
    if extras or attention_mask is not None:
        raise ValueError(f"packed attention knows no {', '.join(extras) or 'mask'}; set model.use_remove_padding=False")


# Models with them get no mask, which is what the functions expect.
AttentionInterface.register(PACKED_SDPA, over_heads(packed_sdpa_attention))
AttentionInterface.register(PACKED_VARLEN, over_heads(packed_varlen_attention))

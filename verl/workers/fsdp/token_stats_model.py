"""A causal language model whose forward pass ends in numbers per token instead of logits.

In:  rows of token ids, the positions to score and their tokens, and a function of their hidden states (`Head`).
Out: that function's result, mostly `TokenStats`.
The head is applied inside this module's forward, so that FSDP2, for which this is the root module, has gathered the
parameters that belong to no block: embedding, last norm and head, which may be one tensor with the embedding.

Not here: how rows become inputs (``workers.actor.row_layout``), sharding (``shard``).

Letters: N tokens of all rows, S scored positions, D hidden size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
"""What is computed at the scored positions, from hidden states (S, D), the head's weight (V, D) and labels (S,)."""


class TokenStatsModel(nn.Module):
    """Decoder, then a head at the scored positions.

    Args:
        causal_lm: a Hugging Face causal language model with a linear head without bias.
        packed: its attention keeps rows apart that are laid end to end; else inputs are padded rows.
        offload_activations: keep what the decoder saves for backward in host memory.

    Raises:
        ValueError: the head does more to the hidden states than one matrix product.
    """

    causal_lm: PreTrainedModel
    packed: bool
    offload_activations: bool

    def __init__(self, causal_lm: PreTrainedModel, packed: bool = True, offload_activations: bool = False) -> None:
        super().__init__()
        head = causal_lm.get_output_embeddings()
        scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        reasons = [name for name in scales if getattr(causal_lm.config, name, None) is not None]
        if not isinstance(head, nn.Linear) or head.bias is not None or reasons:
            reason = ", ".join(reasons) or "a bias, or no matrix"
            raise ValueError(f"{type(causal_lm).__name__} cannot be trained here: its head has more ({reason})")
        self.causal_lm = causal_lm
        self.packed, self.offload_activations = packed, offload_activations

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.causal_lm.device

    @property
    def num_rows(self) -> int:
        """Rows of the lm head."""
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        row_lengths: tuple[int, ...] | None,
        select_index: torch.Tensor,
        labels: torch.Tensor,
        head: Head,
    ) -> Any:
        """Score tokens.

        Args:
            input_ids: (1, N) packed rows, or (B, L) rows padded on the right.
            position_ids: of the same shape; counts from 0 in each row.
            row_lengths: tokens of each packed row; None for padded rows.
            select_index: (S,) positions in the flattened ``input_ids`` whose next token is scored.
            labels: (S,) that token.
            head: what to compute at the scored positions; its result is returned.
        """
        offloads = self.offload_activations and self.training and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=True) if offloads else nullcontext():
            # No attention mask: rows are causal, and what pads them stands on their right, where nothing looks.
            output = self.causal_lm.get_decoder()(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **self._row_boundaries(row_lengths)
            )
        # Outside the block: what a head saves, such as a gradient (V, D), stays on the device.
        hidden = output.last_hidden_state.flatten(0, 1)[select_index]  # (S, D)
        return head(hidden, self.causal_lm.get_output_embeddings().weight, labels)

    def _row_boundaries(self, row_lengths: tuple[int, ...] | None) -> dict[str, object]:
        """Arguments that tell the attention function where rows begin; flash-attention has its own form."""
        if row_lengths is None:
            return {}
        if not self.causal_lm.config._attn_implementation.startswith("flash_attention"):
            return {"row_lengths": row_lengths}
        # Flash-attention takes int32 alone.
        ends = torch.tensor((0, *row_lengths)).cumsum(0).to(device=self.device, dtype=torch.int32)
        longest = max(row_lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

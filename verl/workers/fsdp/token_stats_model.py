"""From padded rows of a batch to a sharded model's numbers per token, without the padding and without logits.

In:  rows [left padding][prompt][response][right padding], the response positions to score, and a function of the hidden
states there (`Head`). Out: micro-batches of model inputs, in which a row ends with the token that predicts its last
scored position (what comes after is causal and would change nothing); the function's result, mostly `TokenStats`.

Two layouts: `packed`, all rows end to end in one sequence with their lengths beside it, and `padded`, rows below each
other, cut to the longest of them, for attention implementations that cannot keep packed rows apart.

The head is applied inside the model's forward, so that FSDP2, for which `TokenStatsModel` is the root module, has
gathered the parameters that belong to no block: embedding, last norm and head, which may be one tensor with the
embedding. Blocks are sharded one by one.

Not here: which positions are scored, which models can take which layout, building the model, optimizer steps.

Letters: B sequences, P prompt, R response, T = P + R, N input tokens of a micro-batch, S scored positions,
D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from verl.config import RefConfig, RolloutConfig
from verl.ops.attention import PACKED_SDPA
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import most_over_ranks, rearrange_micro_batches

# ------------------------------------------------------------------ rows as model inputs


class ModelInputs(NamedTuple):
    """One micro-batch as the model takes it."""

    input_ids: torch.Tensor
    """(1, N) packed, or (rows, longest) padded on the right."""
    position_ids: torch.Tensor
    """The same shape; counts from 0 in each row."""
    row_lengths: tuple[int, ...] | None
    """Tokens of each packed row; None where rows are padded."""
    select_index: torch.Tensor
    """(S,) positions in the flattened ``input_ids`` that predict a scored token."""
    labels: torch.Tensor
    """(S,) the scored tokens."""
    real: torch.Tensor
    """Bool, in the shape of ``input_ids``: no padding."""

    def to(self, device: torch.device) -> "ModelInputs":
        """The same on another device."""
        # In the order of the fields; `row_lengths` alone is no tensor.
        ids, positions, *rest = (value.to(device) for value in self if isinstance(value, torch.Tensor))
        return ModelInputs(ids, positions, self.row_lengths, *rest)


class MicroBatch(NamedTuple):
    """Model inputs, and where in the batch their scored positions lie."""

    inputs: ModelInputs
    rows: torch.Tensor
    """(S,) row in the batch."""
    columns: torch.Tensor
    """(S,) position in the response."""


class BatchSizes(NamedTuple):
    """How large micro-batches may be: by tokens, or else by rows."""

    max_tokens: int
    max_rows: int | None = None
    """Counts instead of the tokens, where it is given."""

    @classmethod
    def of_scoring(cls, config: RolloutConfig | RefConfig) -> "BatchSizes":
        """Those of passes without training."""
        max_rows = None if config.log_prob_use_dynamic_bsz else config.log_prob_micro_batch_size_per_gpu
        return cls(config.log_prob_max_token_len_per_gpu, max_rows)


class ScoredRows:
    """Rows of a batch with the response positions to score, ready to be cut into micro-batches.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 1 from the first prompt token to the last response token.
        select: (B, R) bool, response positions to score; real tokens only.

    Raises:
        ValueError: a row with scored positions has no prompt token, so nothing predicts its first token.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, select: torch.Tensor) -> None:
        self.input_ids, self.select = input_ids, select
        self._prompt_length = input_ids.shape[1] - select.shape[1]
        scored = select.any(dim=1)
        starts = attention_mask.int().argmax(dim=1)  # of the maxima argmax takes the first
        without_prompt = (scored & (starts >= self._prompt_length)).nonzero().flatten().tolist()
        if without_prompt:
            raise ValueError(f"rows {without_prompt} have no prompt token, so nothing predicts their first token")
        # The last True is the first one from the right.
        last_scored = select.shape[1] - 1 - select.int().flip(1).argmax(dim=1)
        self._starts = starts
        # The last scored token is predicted and never read: hence no + 1.
        self.lengths = torch.where(scored, self._prompt_length + last_scored - starts, 0)
        """(B,) input tokens that each row needs; 0 where nothing is scored."""

    def micro_batches(self, sizes: BatchSizes, packed: bool) -> list[MicroBatch]:
        """Cut the rows into micro-batches: as many on every rank, because sharded models communicate in each.

        A micro-batch with nothing to score, as a rank with few rows may have, holds one arbitrary token. A row longer
        than one may be, which `PPOConfig` sees to that there is none, raises ValueError or is one of its own.
        """
        if sizes.max_rows is not None:  # all ranks have as many rows, so as many micro-batches
            parts = [part.tolist() for part in torch.arange(len(self.lengths)).split(sizes.max_rows)]
        elif packed:
            # (B, T) of as many ones in a row as it needs tokens, which is what the next call counts.
            needed = torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
            batch = TensorDict({"attention_mask": needed}, batch_size=[len(needed)])
            parts = rearrange_micro_batches(batch, sizes.max_tokens)[1]
        else:
            parts = _rectangles(self.lengths.tolist(), sizes.max_tokens)
            parts += [[]] * (most_over_ranks(len(parts)) - len(parts))
        return [self.build(rows, packed) for rows in parts]

    def build(self, rows: Sequence[int], packed: bool) -> MicroBatch:
        """The given rows as one micro-batch, in the order given; as in `micro_batches`, never without any token."""
        used = [row for row in rows if self.lengths[row] > 0]
        if not used:
            return no_positions(packed)
        lengths = self.lengths[used].tolist()
        starts = self._starts[used].tolist()
        width = max(lengths)
        pieces = [self.input_ids[row, start : start + n] for row, start, n in zip(used, starts, lengths, strict=True)]
        # (S,) each: row by row in the order of `used`, then by column. All that is scored keeps this order.
        local_rows, columns = self.select[used].nonzero(as_tuple=True)
        if packed:
            input_ids = torch.cat(pieces).unsqueeze(0)
            position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
            offsets = torch.tensor([0, *accumulate(lengths[:-1])])  # where each row begins in the flattened input
        else:
            input_ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
            # Counting on through the padding: a count that starts anew would be taken for the start of a packed row.
            position_ids = torch.arange(width).expand(len(used), width)
            offsets = torch.arange(len(used)) * width
        chosen = torch.tensor(used)[local_rows]
        # Within its row, without the left padding; the token before a scored one predicts it.
        predicting = self._prompt_length + columns - self._starts[chosen] - 1
        select_index, labels = offsets[local_rows] + predicting, self.input_ids[chosen, self._prompt_length + columns]
        row_lengths = tuple(lengths) if packed else None
        real = torch.ones_like(input_ids, dtype=torch.bool) if packed else position_ids < self.lengths[used][:, None]
        inputs = ModelInputs(input_ids, position_ids, row_lengths, select_index, labels, real)
        return MicroBatch(inputs, chosen, columns)


def no_positions(packed: bool) -> MicroBatch:
    """A micro-batch of one arbitrary token with nothing to score."""
    token, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return MicroBatch(ModelInputs(token, token, (1,) if packed else None, none, none, token.bool()), none, none)


def _rectangles(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together, so that rows x longest row stays within ``max_tokens``; longest first."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # Lengths fall, so a part's first row is its longest.
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= max_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def real_response_tokens(data: DataProto) -> torch.Tensor:
    """(B, R) bool, True where a response has a token."""
    return data.tensor("attention_mask")[:, -data.tensor("responses").shape[1] :].bool()


# ------------------------------------------------------------------ the model

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
"""What is computed at the scored positions, from hidden states (S, D), the head's weight (V, D) and labels (S,)."""
RouterHead = Callable[[list[torch.Tensor]], Any]
"""What is computed of the routers' logits, (real tokens, experts) of each layer with experts."""


class TokenStatsModel(nn.Module):
    """Decoder, then a head at the scored positions.

    Args:
        causal_lm: a Hugging Face causal language model with a linear head without bias; it may scale its logits.
        packed: its attention keeps rows apart that are laid end to end; else inputs are padded rows.
        offload_activations: keep what the decoder saves for backward in host memory.

    Raises:
        ValueError: the head does more to the hidden states than one matrix product.
    """

    def __init__(self, causal_lm: PreTrainedModel, packed: bool = True, offload_activations: bool = False) -> None:
        super().__init__()
        head, config = causal_lm.get_output_embeddings(), causal_lm.config
        cap, faults = getattr(config, "final_logit_softcapping", None), []
        if cap is not None:
            faults.append(f"caps its logits (final_logit_softcapping={cap})")
        if not isinstance(head, nn.Linear):
            faults.append(f"is no matrix but {type(head).__name__}")
        elif head.bias is not None:
            faults.append("adds a bias")
        if faults:
            raise ValueError(
                f"{type(causal_lm).__name__} can be neither student nor teacher: its head {' and '.join(faults)}, and "
                "log-probs are computed here from one matrix product; take another model"
            )
        self.causal_lm: PreTrainedModel = causal_lm
        self.packed: bool = packed
        self.offload_activations: bool = offload_activations
        # Cohere multiplies its logits, Granite divides them.
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.causal_lm.device

    @property
    def num_rows(self) -> int:
        """Rows of the lm head."""
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    def run(self, micro: MicroBatch, head: Head, router_head: RouterHead | None = None) -> Any:
        """The head's result for a micro-batch; with ``router_head`` a pair of both results."""
        return self(micro.inputs.to(self.device), head, router_head)

    def forward(self, inputs: ModelInputs, head: Head, router_head: RouterHead | None = None) -> Any:
        """As `run`, for inputs on the device of the parameters."""
        offloads = self.offload_activations and self.training and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=True) if offloads else nullcontext():
            # No attention mask: rows are causal, and what pads them stands on their right, where nothing looks.
            output = self.causal_lm.get_decoder()(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                **({} if router_head is None else {"output_router_logits": True}),
                **self._row_boundaries(inputs.row_lengths),
            )
        # Outside the block: what a head saves, such as a gradient (V, D), stays on the device.
        hidden = output.last_hidden_state.flatten(0, 1)[inputs.select_index]  # (S, D)
        if self._scale != 1.0:  # scaled states give scaled logits
            hidden = hidden * self._scale
        result = head(hidden, self.causal_lm.get_output_embeddings().weight, inputs.labels)
        if router_head is None:
            return result
        return result, router_head([logits.flatten(0, -2)[inputs.real.flatten()] for logits in output.router_logits])

    def _row_boundaries(self, row_lengths: tuple[int, ...] | None) -> dict[str, object]:
        """Arguments that tell the attention function where rows begin; flash kernels have their own form."""
        if row_lengths is None:
            return {}
        if self.causal_lm.config._attn_implementation == PACKED_SDPA:
            return {"row_lengths": row_lengths}
        # Flash kernels take int32 alone.
        ends = torch.tensor((0, *row_lengths)).cumsum(0).to(device=self.device, dtype=torch.int32)
        longest = max(row_lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


# ------------------------------------------------------------------ shards


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters.

    Needed after passes without backward: a parameter that is still gathered would keep its old value through an
    optimizer step, a checkpoint or an export.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def move_parameters(model: nn.Module, device: torch.device) -> None:
    """Move the shards of all parameters, their gradients and all buffers to ``device``."""
    reshard(model)
    # The optimizer knows parameters as objects; torch swaps the content of a DTensor and keeps the object.
    model.to(device)


def move_optimizer_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the optimizer's moments to ``device``; step counts stay where they are."""
    for state in optimizer.state.values():
        for key, value in state.items():
            # Step counts alone have no dimension.
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value.to(device)

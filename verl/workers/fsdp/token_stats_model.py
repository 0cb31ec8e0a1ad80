"""From padded rows of a batch to a sharded model's numbers per token, without the padding and without logits.

In:  rows [left padding][prompt][response][right padding], the response positions to score, and a function of the hidden
states there (`Head`). Out: micro-batches of model inputs, in which a row ends with the token that predicts its last
scored position (what comes after is causal and would change nothing); the function's result, mostly `TokenStats`.

Two layouts: `packed`, all rows end to end in one sequence with their lengths beside it, and `padded`, rows below each
other, cut to the longest of them, for attention implementations that cannot keep packed rows apart.

The head is applied inside the model's forward, so that FSDP2, for which `TokenStatsModel` is the root module, has
gathered the parameters that belong to no block: embedding, last norm and head, which may be one tensor with the
embedding. Blocks are sharded one by one.

Ranks of a sequence group have the same packed rows. On each the decoder gets an equal part of the tokens, wherever rows
begin, and the head an equal part of the scored positions, whose hidden states are sent to it: its work is shared out
too where few of many tokens are scored::

    tokens of rank 0  [ prompt        ]          decoder ──┐   ┌─► head at positions 0..S/2
    tokens of rank 1  [ prompt | s s s s s s ]   decoder ──┴───┴─► head at positions S/2..S

Not here: which positions are scored, which models can take which layout, building the model, optimizer steps.

Letters: B sequences, P prompt, R response, T = P + R, N input tokens of a micro-batch, S scored positions, in a
sequence group this rank's own, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from verl.config import RefConfig, RolloutConfig
from verl.ops.attention import PACKED_SDPA
from verl.ops.sequence_parallel import SequenceGroup
from verl.utils.seqlen_balancing import most_over_ranks, rearrange_micro_batches

# ------------------------------------------------------------------ rows as model inputs


class ModelInputs(NamedTuple):
    """One micro-batch as the model takes it."""

    input_ids: torch.Tensor
    """(1, N) packed, or (rows, longest) padded on the right."""
    position_ids: torch.Tensor
    """The same shape; counts from 0 in each row."""
    row_lengths: tuple[int, ...] | None
    """Tokens of each packed row, over all ranks of a sequence group; None where rows are padded."""
    select_index: torch.Tensor
    """(S,) places in the flattened ``input_ids`` that predict a scored token; in a group those of this rank's part."""
    labels: torch.Tensor
    """(S,) the scored tokens."""
    real: torch.Tensor
    """Bool, in the shape of ``input_ids``: no padding."""
    exchanged: tuple[list[int], list[int]] | None = None
    """In a sequence group, how many hidden states go to each rank, and how many come from each."""

    def to(self, device: torch.device) -> "ModelInputs":
        """The same on another device."""
        fields = self._asdict().items()
        moved: dict[str, Any] = {name: value.to(device) for name, value in fields if isinstance(value, torch.Tensor)}
        return self._replace(**moved)


class MicroBatch(NamedTuple):
    """Model inputs, and where in the batch their scored positions lie."""

    inputs: ModelInputs
    rows: torch.Tensor
    """(S,) row in the batch."""
    columns: torch.Tensor
    """(S,) position in the response."""
    rows_by_rank: Sequence[torch.Tensor]
    """``rows`` of each rank of the sequence group."""


class BatchSizes(NamedTuple):
    """How large micro-batches may be: by tokens, times the ranks of a sequence group, or else by rows."""

    max_tokens: int
    max_rows: int | None = None
    """Counts instead of the tokens, where it is given."""

    @classmethod
    def of_scoring(cls, config: RolloutConfig | RefConfig) -> "BatchSizes":
        """Those of passes without training."""
        max_rows = None if config.log_prob_use_dynamic_bsz else config.log_prob_micro_batch_size_per_gpu
        return cls(config.log_prob_max_token_len_per_gpu, max_rows)


ALONE = SequenceGroup()
"""A rank that computes its rows by itself."""


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

    def micro_batches(
        self, sizes: BatchSizes, packed: bool, group: SequenceGroup = ALONE, beside: torch.Tensor | None = None
    ) -> list[MicroBatch]:
        """Cut the rows into micro-batches: as many on every rank, because sharded models communicate in each.

        A micro-batch with nothing to score (a rank may have few rows) holds one arbitrary token. `PPOConfig` refuses
        limits below the longest row; a longer packed row raises ValueError here, a padded one gets its own micro-batch.

        Args:
            beside: (B,) tokens that another model reads of each row in the same micro-batch; the longer count.
        """
        lengths = self.lengths if beside is None else self.lengths.maximum(beside)
        if sizes.max_rows is not None:  # all ranks have as many rows, so as many micro-batches
            parts = [part.tolist() for part in torch.arange(len(self.lengths)).split(sizes.max_rows)]
        elif packed:
            # As many ones in a row as it needs tokens, which is what the next call counts.
            needed = torch.arange(int(lengths.max())) < lengths[:, None]
            batch = TensorDict({"attention_mask": needed}, batch_size=[len(needed)])
            parts = rearrange_micro_batches(batch, sizes.max_tokens * group.size)[1]
        else:
            parts = _rectangles(lengths.tolist(), sizes.max_tokens)
            parts += [[]] * (most_over_ranks(len(parts)) - len(parts))
        return [self.build(rows, packed, group) for rows in parts]

    def build(
        self, rows: Sequence[int], packed: bool, group: SequenceGroup = ALONE, shares: Sequence[int] | None = None
    ) -> MicroBatch:
        """The given rows as one micro-batch, in the order given; as in `micro_batches`, never without any token.

        Args:
            group: ranks that have the same rows.
            shares: scored positions of each rank of it; None: equal shares.
        """
        micro = self._build(rows, packed)
        return micro if group.size == 1 else _part_of(micro, group, shares)

    def _build(self, rows: Sequence[int], packed: bool) -> MicroBatch:
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
        return MicroBatch(inputs, chosen, columns, [chosen])


def no_positions(packed: bool) -> MicroBatch:
    """A micro-batch of one arbitrary token with nothing to score."""
    token, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    inputs = ModelInputs(token, token, (1,) if packed else None, none, none, token.bool())
    return MicroBatch(inputs, none, none, [none])


def _part_of(micro: MicroBatch, group: SequenceGroup, shares: Sequence[int] | None) -> MicroBatch:
    """This rank's part of a micro-batch of packed rows: of the tokens, padded to equal parts, and of the positions."""
    inputs, rank, size = micro.inputs, group.rank, group.size
    assert inputs.row_lengths is not None, "only packed rows are divided; see `build.require_split`"
    each = -(-inputs.input_ids.shape[1] // size)
    padding = each * size - inputs.input_ids.shape[1]
    tokens = (inputs.input_ids, inputs.position_ids, inputs.real)
    ids, positions, real = (F.pad(values, (0, padding)).split(each, dim=1)[rank] for values in tokens)
    lengths = (*inputs.row_lengths, padding) if padding else inputs.row_lengths
    rows_by_rank = micro.rows.tensor_split(size) if shares is None else micro.rows.split(list(shares))
    # (S of all ranks,): whose token gives a position's hidden state, and whose head takes it. Positions ascend, so both
    # do, and what comes from all ranks, one after the other, is in order.
    giver = inputs.select_index // each
    taker = torch.arange(size).repeat_interleave(torch.tensor([len(rows) for rows in rows_by_rank]))
    given, taken = giver == rank, taker == rank
    exchanged = (taker[given].bincount(minlength=size).tolist(), giver[taken].bincount(minlength=size).tolist())
    select_index = inputs.select_index[given] - rank * each
    part = ModelInputs(ids, positions, lengths, select_index, inputs.labels[taken], real, exchanged)
    return MicroBatch(part, micro.rows[taken], micro.columns[taken], rows_by_rank)


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
        group: the ranks that compute the same rows together.

    Raises:
        ValueError: the head does more to the hidden states than one matrix product.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, packed: bool, offload_activations: bool = False, group: SequenceGroup = ALONE
    ) -> None:
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
        self.packed, self.offload_activations, self.group = packed, offload_activations, group
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
        hidden = output.last_hidden_state.flatten(0, 1)[inputs.select_index]  # (S, D), in a group before the exchange
        if inputs.exchanged is not None:
            hidden = self.group.exchange(hidden, *inputs.exchanged)
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
        group = {"sequence_group": self.group} if self.group.size > 1 else {}
        if self.causal_lm.config._attn_implementation == PACKED_SDPA:
            return {"row_lengths": row_lengths, **group}
        # Flash kernels take int32 alone.
        ends = torch.tensor((0, *row_lengths)).cumsum(0).to(device=self.device, dtype=torch.int32)
        longest = max(row_lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest, **group}


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

"""The loss of one mini-batch, share by share.

In:  the rows of one optimizer step that lie on this rank; then, micro-batch by micro-batch, fresh token statistics.
Out: losses that, summed over micro-batches and averaged over ranks as FSDP does, are the loss of the whole mini-batch.

    loss = clipped policy loss - entropy_coeff * entropy + kl_loss_coef * KL(policy || reference)

The policy and entropy terms run over trained tokens. The KL term runs over those of them that the reference knows.

Not here: forward and backward passes, the formulas themselves (``core_algos``).

Letters: M rows of the mini-batch, R response, S scored positions, C rows of a micro-batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from verl.config import FSDPActorConfig
from verl.ops.linear_log_prob import TokenStats
from verl.ops.policy_loss import agg_loss, compute_policy_loss_vanilla, count_trained, kl_penalty
from verl.protocol import DataProto
from verl.workers.actor.row_layout import MicroBatch
from verl.workers.fsdp.token_stats_model import ScoreOptions

LOSS_TENSORS = ("old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights")
"""What the loss reads per token, where it is there."""


class _Counts(NamedTuple):
    """Denominators: trained tokens, and sequences with at least one, over the mini-batch on all ranks."""

    tokens: torch.Tensor
    sequences: torch.Tensor


class MiniBatchLoss:
    """Loss of the micro-batches of one mini-batch. Every rank must construct it: the counts are summed over ranks.

    Args:
        mini: M rows with ``response_mask``, ``old_log_probs``, ``advantages``, ``ref_log_prob`` where the KL term is
            on, and ``rollout_is_weights`` where tokens are weighted.
        config: the loss settings.
        device: where statistics arrive.
        dp_size: ranks whose gradients are averaged.
        vocab_size: ids in the policy's softmax; None: all rows of its head.
    """

    def __init__(
        self,
        mini: DataProto,
        config: FSDPActorConfig,
        device: torch.device,
        dp_size: int,
        vocab_size: int | None = None,
    ) -> None:
        self._config = config
        self._dp_size = dp_size
        with_entropy = config.entropy_coeff != 0
        self._head = ScoreOptions(temperature_of(mini), vocab_size, None, with_entropy=with_entropy)
        self._tensors = {key: mini.tensor(key).to(device) for key in LOSS_TENSORS if key in mini.batch}
        self.trained = mini.tensor("response_mask").bool()
        """(M, R) positions that are scored and trained, on the CPU."""
        self._known = self.trained
        if config.use_kl_loss:
            self._known = self.trained & (mini.tensor("ref_log_prob") != config.ref_log_prob_replace_val)
        counts = torch.stack([*count_trained(self.trained), *count_trained(self._known)]).to(device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        self._trained_counts, self._known_counts = _Counts(counts[0], counts[1]), _Counts(counts[2], counts[3])
        self.is_empty = int(counts[0]) == 0
        """Whether no rank has a trained token in this mini-batch."""

    def head(self, micro: MicroBatch) -> ScoreOptions:
        """What the model has to compute of a micro-batch."""
        return self._head

    def __call__(self, micro: MicroBatch, stats: TokenStats) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch and its metrics, 0-dim, both shares of the mini-batch's times ``dp_size``.

        ``stats`` holds (S,) tensors for the positions of ``micro``, with the entropy if ``entropy_coeff`` is not 0.
        """
        config, device = self._config, stats.log_probs.device
        rows, row_of = micro.rows.unique(return_inverse=True)
        position = (row_of.to(device), micro.columns.to(device))

        def spread(values: torch.Tensor) -> torch.Tensor:
            """(S,) to (C, R), 0 elsewhere."""
            return values.new_zeros(len(rows), self.trained.shape[1]).index_put(position, values)

        def rows_of(key: str) -> torch.Tensor:
            return self._tensors[key][rows.to(device)]

        mask, log_prob = self.trained[rows].to(device), spread(stats.log_probs)
        loss, metrics = compute_policy_loss_vanilla(
            rows_of("old_log_probs"),
            log_prob,
            rows_of("advantages"),
            mask,
            config.loss_agg_mode,
            config,
            rows_of("rollout_is_weights") if "rollout_is_weights" in self._tensors else None,
            self._dp_size,
            self._trained_counts.tokens,
            self._trained_counts.sequences,
        )
        metrics["actor/pg_loss"] = loss.detach()
        if config.entropy_coeff != 0:
            assert stats.entropy is not None, "an entropy term needs the entropy"
            entropy = self._mean(spread(stats.entropy), mask, self._trained_counts)
            metrics["actor/entropy_loss"] = entropy.detach()
            loss = loss - config.entropy_coeff * entropy
        if config.use_kl_loss:
            divergence = kl_penalty(log_prob, rows_of("ref_log_prob"), config.kl_loss_type)
            kl_loss = self._mean(divergence, self._known[rows].to(device), self._known_counts)
            metrics["actor/kl_loss"] = kl_loss.detach()
            loss = loss + config.kl_loss_coef * kl_loss
        return loss, metrics

    def _mean(self, values: torch.Tensor, mask: torch.Tensor, counts: _Counts) -> torch.Tensor:
        return agg_loss(values, mask, self._config.loss_agg_mode, self._dp_size, counts.tokens, counts.sequences)


def temperature_of(data: DataProto) -> float:
    """The sampling temperature that a batch was drawn with; raises ValueError where it does not say."""
    if "temperature" not in data.meta_info:
        raise ValueError("the batch has no meta_info['temperature']; the trainer sets it to rollout.temperature")
    return float(data.meta_info["temperature"])

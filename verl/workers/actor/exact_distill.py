"""The loss of one mini-batch where whole distributions are compared, share by share.

In:  the rows of one optimizer step that lie on this rank, and their frozen teachers. Out: what the student's head
computes of a micro-batch, and losses that, summed over micro-batches and averaged over ranks as FSDP does, are the loss
of the whole mini-batch.

    loss = mean over trained tokens of  weight of the row's teacher x (D(student, teacher) + leak_coef x leak)

Every row has one teacher. A teacher of this process reads its own rows alone, in the same micro-batch as the student,
so neither its logits nor its hidden states are kept or sent; others have read them before (``teachers``). A teacher
that knows all ids judges over all of them, without leak term. What the teachers say of the drawn tokens falls out of
the same pass.

Not here: the divergences (``utils.linear_divergence``), forward and backward passes.

Letters: M rows of the mini-batch, R response, S scored positions of a micro-batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from verl.config import DistillConfig, FSDPActorConfig
from verl.ops.linear_divergence import (
    REVERSE_KL,
    SHARED,
    DivergenceOptions,
    DivergenceStats,
    linear_divergence,
)
from verl.ops.policy_loss import agg_loss, count_trained
from verl.ops.teacher_log_probs import TeacherLogProbs
from verl.protocol import DataProto
from verl.workers.actor.mini_batch_loss import temperature_of
from verl.workers.actor.row_layout import MicroBatch, ScoredRows
from verl.workers.actor.teachers import HIDDEN_STATE_HANDLES, TOP_TENSORS, ScoredPositions, Teacher

DIVERGENCE_OF = {"exact": "reverse_kl", "forward_kl": "forward_kl", "jsd": "jsd", "topk": "reverse_kl"}
"""The divergence that each exact objective minimises."""
ROW_KEYS = ("teacher", *TOP_TENSORS, HIDDEN_STATE_HANDLES)
"""What the loss reads per row, where it is there."""


class Vocabulary(NamedTuple):
    """The student's ids."""

    size: int | None
    extend_start: int | None


class ExactDistillLoss:
    """Loss of the micro-batches of one mini-batch. Every rank must construct it: the counts are summed over ranks.

    Args:
        mini: M rows with ``input_ids``, ``attention_mask``, ``response_mask`` and, where there are several teachers,
            ``teacher`` (M,), the place of each row's teacher among ``teachers``; ``meta_info["temperature"]``.
        config: the actor's settings, of which the loss aggregation and ``ref_log_prob_replace_val`` are used.
        distill: the objective.
        teachers: who judges, and the weight of each one's rows.
        vocabulary: the student's.
        device: where the models compute.
        dp_size: ranks whose gradients are averaged.
        said: (M, R) room for the teachers' log-probs of the drawn tokens, each over all ids that its teacher knows;
            filled at trained positions, micro-batch by micro-batch.
    """

    def __init__(
        self,
        mini: DataProto,
        config: FSDPActorConfig,
        distill: DistillConfig,
        teachers: Sequence[tuple[Teacher, float]],
        vocabulary: Vocabulary,
        device: torch.device,
        dp_size: int,
        said: torch.Tensor | None = None,
    ) -> None:
        self._said = said
        self.trained = mini.tensor("response_mask").bool()
        """(M, R) positions that are scored and trained, on the CPU."""
        self._mini, self._distill, self._vocabulary, self._device = mini, distill, vocabulary, device
        self._temperature = temperature_of(mini)
        self._missing_log_prob = config.ref_log_prob_replace_val
        self._teachers = [teacher for teacher, _ in teachers]
        self._teacher_of = torch.zeros(len(mini), dtype=torch.int64)
        if "teacher" in mini.batch:
            self._teacher_of = mini.tensor("teacher").cpu()
        self._rows = ScoredRows(mini.tensor("input_ids"), mini.tensor("attention_mask"), self.trained)
        self._judges_token = self._inside_support()
        tokens, sequences = count_trained(self.trained)
        counts = torch.stack([tokens, sequences, self._judges_token.sum()]).to(device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.is_empty = int(counts[0]) == 0
        """Whether no rank has a trained token in this mini-batch."""
        of_reverse_kl = DIVERGENCE_OF[distill.objective] == REVERSE_KL
        self._gap_share = dp_size / int(counts[2]) if of_reverse_kl and counts[2] else None
        self._token_share = _token_weights(self.trained, config.loss_agg_mode, dp_size, counts.cpu())
        of_row = torch.tensor([weight for _, weight in teachers])[self._teacher_of]
        self._token_weights = self._token_share * of_row[:, None]

    def _inside_support(self) -> torch.Tensor:
        """(M, R) bool: trained positions whose drawn token is among the ids that are compared there."""
        supports = [self._options_of(teacher).support for teacher in self._teachers]
        start = self._vocabulary.extend_start
        if start is None or SHARED not in supports:
            return self.trained
        shared = torch.tensor([support == SHARED for support in supports])[self._teacher_of]
        drawn = self._mini.tensor("input_ids")[:, -self.trained.shape[1] :].cpu()
        return self.trained & (~shared[:, None] | (drawn < start))

    def head(self, micro: MicroBatch) -> "_Divergence":
        """What the student's head has to compute; runs the teachers' forward passes."""
        groups = []
        for number, teacher in enumerate(self._teachers):
            members = self._teacher_of[micro.rows] == number
            taught = ScoredPositions(self._mini, self._rows, micro.rows[members], micro.columns[members])
            log_probs = teacher.teach(taught, self._temperature)
            groups.append((members.nonzero().flatten().to(self._device), log_probs, self._options_of(teacher)))
        weights = self._token_weights[micro.rows, micro.columns].to(self._device)
        return _Divergence(groups, weights, self._vocabulary)

    def _options_of(self, teacher: Teacher) -> DivergenceOptions:
        distill = self._distill
        return DivergenceOptions(
            kind=DIVERGENCE_OF[distill.objective],
            beta=distill.beta,
            support="full" if teacher.knows_extended else distill.support,
            temperature=self._temperature,
            missing_log_prob=self._missing_log_prob,
            leak_coef=0.0 if teacher.knows_extended else distill.leak_coef,
            leak_target=distill.leak_target,
        )

    def __call__(
        self, micro: MicroBatch, result: tuple[torch.Tensor, DivergenceStats]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch and its metrics, 0-dim, both shares of the mini-batch's times ``dp_size``; fills in
        what teachers said of its tokens.

        ``distill/sampled_gap``: what the drawn tokens say of the reverse KL, mean of log p - log q over trained tokens
        inside the support, less the mean of the exact one at the same positions and over the same support; nats. Its
        mean over tokens drawn from the student is 0, so it is the noise of the ``sampled`` objective's estimate.
        """
        loss, stats = result
        if self._said is not None:
            self._said[micro.rows, micro.columns] = stats.teacher_log_prob.to(self._said.dtype)
        share = self._token_share[micro.rows, micro.columns].to(stats.divergence.device)
        metrics = {
            "actor/distill_loss": loss.detach(),
            "actor/distill_divergence": (share * stats.divergence).sum(),
            "actor/leak_loss": (share * stats.leak).sum(),
        }
        if self._vocabulary.extend_start is not None:  # the part of the divergence where an item token was drawn
            extended = micro.inputs.labels.to(share.device) >= self._vocabulary.extend_start
            metrics["actor/extend_divergence"] = (share * stats.divergence * extended).sum()
        if self._gap_share is not None:
            judged = self._judges_token[micro.rows, micro.columns].to(share.device)
            metrics["distill/sampled_gap"] = (judged * (stats.sampled - stats.divergence)).sum() * self._gap_share
        return loss, metrics


class _Divergence:
    """A head: the divergence of each group of positions from its teacher, added up.

    A plain class, so that FSDP's casts of a forward pass's arguments leave the tensors in it alone.
    """

    def __init__(
        self,
        groups: Sequence[tuple[torch.Tensor, TeacherLogProbs, DivergenceOptions]],
        weights: torch.Tensor,
        vocabulary: Vocabulary,
    ) -> None:
        self._groups, self._weights, self._vocabulary = groups, weights, vocabulary

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, DivergenceStats]:
        """The loss, and figures of all S positions in their order."""
        losses, measured = [], []
        # A gradient of the whole head for a group without positions would be a large tensor of zeros.
        groups = [group for group in self._groups if len(group[0])] or self._groups[:1]
        for members, teacher, options in groups:
            loss, stats = linear_divergence(
                hidden[members],
                weight,
                self._weights[members],
                teacher,
                options,
                vocab_size=self._vocabulary.size,
                extend_start=self._vocabulary.extend_start,
                labels=labels[members],
            )
            losses.append(loss)
            measured.append(stats if options.leak_coef else stats._replace(leak=torch.zeros_like(stats.leak)))
        order = torch.cat([members for members, _, _ in groups]).argsort()
        columns = zip(*measured, strict=True)
        return torch.stack(losses).sum(), DivergenceStats(*(torch.cat(values)[order] for values in columns))


def _token_weights(trained: torch.Tensor, mode: str, dp_size: int, counts: torch.Tensor) -> torch.Tensor:
    """(M, R) what each token's loss is multiplied with: the gradient of ``agg_loss``, which is linear in them."""
    losses = torch.zeros(trained.shape, requires_grad=True)
    total = agg_loss(losses, trained, mode, dp_size, counts[0], counts[1])
    return torch.autograd.grad(total, losses)[0]

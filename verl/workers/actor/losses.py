"""The student's loss over one mini-batch, micro-batch by micro-batch.

In:  the rows of one optimizer step that lie on this rank, the teachers of a divergence objective; then the
micro-batches, with a function that runs the student. Out: losses that, summed over micro-batches and averaged over
ranks as FSDP does, are the loss of the whole mini-batch over all ranks; their metrics; the scores of the drawn tokens
(``UPDATE_SCORES``).

    policy      clipped policy loss - entropy_coeff * entropy + kl_loss_coef * KL(policy || reference)
    divergence  mean over trained tokens of  weight of the row's teacher * (D(student, teacher) + leak_coef * leak)
    loss        policy, or divergence, or policy + coef * divergence

The policy and entropy terms run over trained tokens, the KL term over those of them that the reference knows. A batch
that is one optimizer step may come without ``old_log_probs``: they are those of this pass, and distillation's part of
the advantage is made from them. A divergence needs whole distributions: teachers of this process run in the same
micro-batch as the student, so that neither their logits nor their hidden states are kept. A teacher that knows all ids
is compared over all of them, without leak term.

Not here: the formulas (``ops.policy_loss``, ``ops.linear_divergence``), backward passes.

Letters: M rows of the mini-batch, R response, S scored positions of a micro-batch, C rows of a micro-batch.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from verl.config import DistillConfig, FSDPActorConfig
from verl.ops.linear_divergence import FULL, REVERSE_KL, SHARED, DivergenceOptions, DivergenceStats, linear_divergence
from verl.ops.linear_log_prob import TokenStats, linear_token_stats
from verl.ops.policy_loss import agg_loss, compute_policy_loss_vanilla, count_trained, kl_penalty
from verl.protocol import DataProto
from verl.vocabulary import Vocabulary
from verl.workers.actor.router_loss import RouterLoss
from verl.workers.actor.teachers import TOP_TENSORS, ScoredPositions, Teacher
from verl.workers.fsdp.token_stats_model import Head, MicroBatch, ScoredRows

POLICY_TENSORS = ("old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights")
"""Batch keys (B, R) of the policy loss; the first two unless they are made here, the last two where used."""
TEACHER_ROWS = ("teacher_input_ids", "teacher_attention_mask")
"""Rows as teachers of this process read them, where some have prompts of their own; responses are the student's."""
ROW_KEYS = ("teacher", *TOP_TENSORS, "teacher_states", *TEACHER_ROWS)
"""Batch keys of the divergence; each only where its teachers need it."""
DIVERGENCE_OF = {"exact": "reverse_kl", "forward_kl": "forward_kl", "jsd": "jsd", "topk": "reverse_kl"}
"""The divergence that each of these objectives minimises."""

UPDATE_SCORES = ("old_log_probs", "entropys", "extend_mass", "ref_log_prob", "divergence")
"""Batch keys (B, R) that the pass of a divergence gives at trained positions: the first four as scoring would before
the update, the last what was minimised there, without leak term and the teacher's weight."""
STUDENT_SCORES = UPDATE_SCORES[:3]
"""Those that the pass of a policy loss alone gives, where the batch has no ``old_log_probs``."""

Advantage = Callable[[DataProto], torch.Tensor]
"""Rows with ``old_log_probs``, ``ref_log_prob``, ``response_mask``, and ``teacher`` where there are several, to what
distillation adds to their advantages (rows, R)."""
WeightedTeacher = tuple[Teacher, float]
"""A teacher, and the weight of its rows in the loss."""


class MicroLoss(NamedTuple):
    """A micro-batch's share of the mini-batch's loss, times the number of ranks."""

    loss: torch.Tensor
    """0-dim, with gradient."""
    metrics: dict[str, torch.Tensor]
    """0-dim each, shares as the loss."""
    scores: torch.Tensor | None = None
    """Of the drawn tokens, in the order of ``UPDATE_SCORES``: (5, S) with a divergence; (3, S) of a policy loss alone,
    or None where the batch has ``old_log_probs``."""


@dataclasses.dataclass(eq=False)
class MiniBatchLoss:
    """Loss of the micro-batches of one mini-batch. Every rank must construct it: counts are summed over ranks."""

    mini: DataProto
    """M rows with ``input_ids``, ``attention_mask``, ``response_mask``; the keys of ``POLICY_TENSORS`` for a policy
    loss, without ``old_log_probs`` where the policy is still the one that wrote; ``teacher`` (M,), an index into
    ``teachers``, where there are several; and ``meta_info["temperature"]``."""
    config: FSDPActorConfig
    """The actor's settings."""
    vocabulary: Vocabulary
    """The student's."""
    device: torch.device
    """Where the models compute."""
    distill: DistillConfig
    """The objective."""
    teachers: Sequence[WeightedTeacher]
    """Of a divergence objective."""
    advantage_part: Advantage | None
    """Is added to ``advantages``, if any, where ``old_log_probs`` are not there."""

    def __post_init__(self) -> None:
        self.trained = self.mini.tensor("response_mask").bool()
        """(M, R) positions that are scored and trained, on the CPU."""
        self.teacher_lengths = torch.zeros(len(self.mini), dtype=torch.int64)
        """(M,) input tokens that teachers of this process read of each row."""
        self._parts: list[tuple[float, PolicyLoss | DivergenceLoss]] = []
        if self.distill.has_policy_loss:
            self._parts.append((1.0, PolicyLoss(self)))
        if self.distill.is_divergence:
            divergence = DivergenceLoss(self)
            self.teacher_lengths = divergence.lengths
            # Without a coef distillation stands alone; where a reward is learned from, `config.ppo` refuses 0.
            self._parts.append((self.distill.coef or 1.0, divergence))
        self.is_empty = int(self._parts[0][1].counts[0]) == 0
        """Whether no rank has a trained token in this mini-batch."""

    def __call__(
        self, micro: MicroBatch, run_student: Callable[..., Any], router_loss: RouterLoss | None = None
    ) -> MicroLoss:
        """Run teachers and student on a micro-batch.

        Args:
            micro: positions of ``trained``.
            run_student: the student's forward pass over ``micro``, which ends in the given heads.
            router_loss: of the mini-batch, to be added.
        """
        heads = [part.head(micro) for _, part in self._parts]
        # All in one forward pass, and one backward pass for the gradient of their sum.

        def run_heads(*states: torch.Tensor) -> list[Any]:
            return [head(*states) for head in heads]

        if router_loss is None:
            results = run_student(run_heads)
        else:
            results, balance = run_student(run_heads, router_loss.share)
        losses = [part.of(micro, result) for (_, part), result in zip(self._parts, results, strict=True)]
        total = torch.stack([coef * loss.loss for (coef, _), loss in zip(self._parts, losses, strict=True)]).sum()
        metrics = dict(ChainMap(*(loss.metrics for loss in losses)))
        if router_loss is not None:
            total = total + router_loss.coef * balance
            metrics["actor/router_aux_loss"] = balance.detach()
        # The divergence, where there is one, is the last part.
        return MicroLoss(total, metrics, losses[-1].scores)


def _over_ranks(counts: list[torch.Tensor], device: torch.device, config: FSDPActorConfig) -> torch.Tensor:
    """Counts over all ranks; those of a sequence group have the same rows, which count once."""
    dist.all_reduce(total := torch.stack(counts).to(device))
    return total // config.ulysses_sequence_parallel_size


class PolicyLoss:
    """Clipped policy loss, with entropy and KL terms where they are on."""

    def __init__(self, whole: MiniBatchLoss) -> None:
        mini, config, vocabulary, distill = whole.mini, whole.config, whole.vocabulary, whole.distill
        self._config, self._temperature = config, mini.meta_info["temperature"]
        scored = "old_log_probs" in mini.batch
        self._gives_scores = not scored and not distill.is_divergence  # beside a divergence, that gives them
        self._advantage_part = None if scored else whole.advantage_part
        mini.require("advantages" if self._advantage_part is None else "ref_log_prob")
        # Without its extension, unless the mass on item tokens is to be measured: it is no part of this loss.
        self._vocabulary = vocabulary if self._gives_scores else Vocabulary(vocabulary.ids)
        keys = [key for key in (*POLICY_TENSORS, "teacher") if key in mini.batch]
        self._tensors = {key: mini.tensor(key).to(whole.device) for key in keys}
        self._trained = self._known = mini.tensor("response_mask").bool()
        if config.use_kl_loss:
            self._known = self._trained & (mini.tensor("ref_log_prob") != config.ref_log_prob_replace_val)
        self.counts = _over_ranks([*count_trained(self._trained), *count_trained(self._known)], whole.device, config)
        """Trained tokens, rows with at least one, and the same of those that the reference knows; over all ranks."""

    def head(self, micro: MicroBatch) -> Head:
        """What the student computes at each position."""
        return partial(
            linear_token_stats,
            temperature=self._temperature,
            vocabulary=self._vocabulary,
            with_entropy=self._gives_scores or self._config.entropy_coeff != 0,
        )

    def of(self, micro: MicroBatch, stats: TokenStats) -> MicroLoss:
        """Loss of a micro-batch from the (S,) statistics of its positions."""
        config, device = self._config, stats.log_probs.device
        # (C,), and (S,) places in it. A row is never split over micro-batches, but over the ranks of a sequence group.
        rows, row_of = micro.rows.unique(return_inverse=True)
        position = (row_of.to(device), micro.columns.to(device))

        def spread(values: torch.Tensor) -> torch.Tensor:
            """(S,) to (C, R), 0 elsewhere."""
            return values.new_zeros(len(rows), self._trained.shape[1]).index_put(position, values)

        own = spread(torch.ones_like(stats.log_probs)).bool()

        def mean(values: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            whole = mask[rows].to(device)
            of_all = (*counts, whole.sum(-1))
            return agg_loss(values, whole & own, config.loss_agg_mode, dist.get_world_size(), *of_all)

        mask, log_prob = self._trained[rows].to(device), spread(stats.log_probs)
        given = {key: values[rows.to(device)] for key, values in self._tensors.items()}
        given.setdefault("old_log_probs", log_prob.detach())
        if self._advantage_part is not None:
            data = DataProto.from_dict({**given, "response_mask": mask})
            given["advantages"] = given.get("advantages", 0.0) + self._advantage_part(data)
        old, advantages, weights = given["old_log_probs"], given["advantages"], given.get("rollout_is_weights")
        of_all = (*self.counts[:2], mask.sum(-1))
        loss, metrics = compute_policy_loss_vanilla(
            old, log_prob, advantages, own, config.loss_agg_mode, config, weights, dist.get_world_size(), *of_all
        )
        metrics["actor/pg_loss"] = loss.detach()
        if config.entropy_coeff != 0:
            assert stats.entropy is not None, "an entropy term needs the entropy"
            entropy = mean(spread(stats.entropy), self._trained, self.counts[:2])
            metrics["actor/entropy_loss"] = entropy.detach()
            loss = loss - config.entropy_coeff * entropy
        if config.use_kl_loss:
            divergence = kl_penalty(log_prob, given["ref_log_prob"], config.kl_loss_type)
            kl_loss = mean(divergence, self._known, self.counts[2:])
            metrics["actor/kl_loss"] = kl_loss.detach()
            loss = loss + config.kl_loss_coef * kl_loss
        if not self._gives_scores:
            return MicroLoss(loss, metrics)
        mass = torch.zeros_like(stats.log_probs) if stats.extend_mass is None else stats.extend_mass
        assert stats.entropy is not None, "`head` asks for it"
        return MicroLoss(loss, metrics, torch.stack([stats.log_probs, stats.entropy, mass]).detach())


class DivergenceLoss:
    """Divergence from the teachers, each row from its own."""

    def __init__(self, whole: MiniBatchLoss) -> None:
        mini, config, vocabulary, distill = whole.mini, whole.config, whole.vocabulary, whole.distill
        self._mini, self._vocabulary, self._device = mini, vocabulary, whole.device
        self._trained, self._temperature = mini.tensor("response_mask").bool(), mini.meta_info["temperature"]
        self._teachers = [teacher for teacher, _ in whole.teachers]
        kind, missing = DIVERGENCE_OF[distill.objective], config.ref_log_prob_replace_val
        settings = {name: getattr(distill, name) for name in ("beta", "support", "leak_coef", "leak_target")}
        options = DivergenceOptions(kind, temperature=self._temperature, missing_log_prob=missing, **settings)
        over_all = dataclasses.replace(options, support=FULL, leak_coef=0.0)
        self._options = [over_all if teacher.knows_extended else options for teacher in self._teachers]
        self._teacher_of = mini.batch.get("teacher", torch.zeros(len(mini), dtype=torch.int64))
        read = TEACHER_ROWS if TEACHER_ROWS[0] in mini.batch else ("input_ids", "attention_mask")
        self._rows = ScoredRows(mini.tensor(read[0]), mini.tensor(read[1]), self._trained)
        self.lengths = self._rows.lengths
        """(M,) input tokens of each row as its teacher reads it."""
        self._in_support = self._trained
        """(M, R) bool: trained positions whose drawn token is among the ids that are compared there."""
        if vocabulary.extend_start is not None:
            shared = torch.tensor([options.support == SHARED for options in self._options])[self._teacher_of]
            drawn = mini.tensor("input_ids")[:, -self._trained.shape[1] :]
            self._in_support = self._trained & (~shared[:, None] | (drawn < vocabulary.extend_start))
        self.counts = _over_ranks([*count_trained(self._trained), self._in_support.sum()], whole.device, config)
        """Trained tokens, rows with at least one, and trained tokens inside the support; over all ranks."""
        is_reverse_kl = options.kind == REVERSE_KL
        # Times the number of ranks, as the losses: metrics are averaged over ranks at the end.
        self._gap_share = dist.get_world_size() / int(self.counts[2]) if is_reverse_kl and self.counts[2] else None
        # The factor of each token's loss is the gradient of `agg_loss`, which is linear in them.
        losses = torch.zeros(self._trained.shape, requires_grad=True)
        total = agg_loss(losses, self._trained, config.loss_agg_mode, dist.get_world_size(), *self.counts[:2].cpu())
        self._token_share = torch.autograd.grad(total, losses)[0]
        # (M, R) times (M, 1), the weight of each row's teacher.
        weights = torch.tensor([weight for _, weight in whole.teachers])[self._teacher_of]
        self._token_weights = self._token_share * weights[:, None]

    def head(self, micro: MicroBatch) -> Head:
        """Run the teachers; what the student computes of a micro-batch: its divergence from them."""
        weights = self._token_weights[micro.rows, micro.columns].to(self._device)
        groups = []
        for number, (teacher, options) in enumerate(zip(self._teachers, self._options, strict=True)):
            members = self._teacher_of[micro.rows] == number
            by_rank = [rows[self._teacher_of[rows] == number] for rows in micro.rows_by_rank]
            positions = ScoredPositions(self._mini, self._rows, micro.rows[members], micro.columns[members], by_rank)
            # Also without positions: the other ranks' shards of its model wait for this rank.
            log_probs = teacher.log_probs_at(positions, self._temperature)
            groups.append((members.nonzero().flatten().to(self._device), log_probs, options))
        # A gradient of the whole head for a group without positions would be a large tensor of zeros.
        groups = [group for group in groups if len(group[0])] or groups[:1]
        # Results come group by group; argsort of a permutation is its inverse.
        order = torch.cat([members for members, _, _ in groups]).argsort()

        def compare(
            hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
        ) -> tuple[torch.Tensor, DivergenceStats]:
            """The loss, and the statistics of all S positions in their order."""
            losses, measured = [], []
            for members, log_probs, options in groups:
                loss, stats = linear_divergence(
                    hidden[members], weight, weights[members], log_probs, options, labels[members], self._vocabulary
                )
                losses.append(loss)
                measured.append(stats)
            columns = zip(*measured, strict=True)
            return torch.stack(losses).sum(), DivergenceStats(*(torch.cat(values)[order] for values in columns))

        return compare  # a function, because FSDP casts the tensors in a tuple among a forward pass's arguments

    def of(self, micro: MicroBatch, compared: tuple[torch.Tensor, DivergenceStats]) -> MicroLoss:
        """Metrics of a micro-batch other than its loss.

        ``distill/sampled_gap``: mean of log p - log q of the drawn tokens over trained tokens inside the support, less
        the mean of the exact reverse KL at the same positions and over the same support; nats. Its mean over tokens
        drawn from the student is 0, so it is the noise of the ``sampled`` objective's estimate.
        """
        loss, stats = compared
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
            inside = self._in_support[micro.rows, micro.columns].to(share.device)
            metrics["distill/sampled_gap"] = (inside * (stats.sampled - stats.divergence)).sum() * self._gap_share
        scores = stats.log_prob, stats.entropy, stats.extend_mass, stats.teacher_log_prob, stats.divergence
        return MicroLoss(loss, metrics, torch.stack(scores))

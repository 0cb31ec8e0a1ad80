"""Scores and trains a policy on one data-parallel rank.

In:  a `DataProto` of rollouts with ``meta_info["temperature"]``, and a sharded `TokenStatsModel`. Out: log-probs,
entropies and extended-vocabulary mass (B, R), or an updated model and its metrics.

    update:  batch ─► mini-batches (one optimizer step each) ─► micro-batches (one forward and backward each)

Losses are divided by the counts of the whole mini-batch over all ranks, so the gradient does not depend on how rows
fall on ranks and micro-batches. All ranks make the same number of passes, because sharded models communicate in each.

Not here: advantages, moving models between host and GPU, which process is which rank.

Letters: B rows of this rank, P prompt, R response, T = P + R, S scored positions of a micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from verl.config import DistillConfig, FSDPActorConfig, RefConfig
from verl.ops.linear_log_prob import TokenStats
from verl.ops.teacher_log_probs import LinearTeacher
from verl.protocol import DataProto
from verl.workers.actor.exact_distill import ROW_KEYS, ExactDistillLoss, Vocabulary
from verl.workers.actor.mini_batch_loss import LOSS_TENSORS, MiniBatchLoss, temperature_of
from verl.workers.actor.row_layout import BatchSizes, MicroBatch, ScoredRows, no_positions
from verl.workers.actor.task_and_distill import TaskAndDistillLoss
from verl.workers.actor.teachers import ScoredPositions, Teacher
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.fsdp.optimizer import LearningRateSchedule, clipped_step
from verl.workers.fsdp.shard import reshard
from verl.workers.fsdp.token_stats_model import Head, ScoreOptions, TokenStatsModel

LOSS_KEYS = ("responses", "response_mask", "input_ids", "attention_mask")
"""What every update reads of a batch."""
POLICY_KEYS = ("old_log_probs", "advantages")
"""What a policy loss reads besides; a divergence alone follows no advantage."""
SCORED_KEYS = ("responses", "input_ids", "attention_mask", "distill_special_token_mask")
"""What scoring reads of a batch, where it is there; the rest need not travel."""
UPDATE_KEYS = (*LOSS_KEYS, *LOSS_TENSORS, *ROW_KEYS)
"""What an update reads, where it is there."""
COUNTS = ("actor/updates", "actor/skipped_updates")
"""Optimizer steps that were taken, and those that were not because loss or gradient was not finite."""


class DataParallelPPOActor:
    """A policy, trained or frozen.

    Args:
        config: the actor's settings, or the reference's for a frozen model.
        actor_module: the sharded model.
        actor_optimizer: None for a frozen model.
        lr_schedule: drives the optimizer's learning rate; given with it.
        vocab_size: ids that take part in the softmax.
        extend_start: first extended id; None: no extended vocabulary.
        replace_token_id: what a frozen model reads in place of ids from ``vocab_size`` on.
        packed: layout of the model's inputs.
        mini_batch_rows: rows of this rank in one optimizer step.
        distill: the objective of a student; None: the policy-gradient losses.
        knows_extended: of a frozen model, whether it knows all of the student's ids.
        extended_rows: of a student with an extended vocabulary: what becomes of them in an update.
        device: where the model computes.
    """

    def __init__(
        self,
        config: FSDPActorConfig | RefConfig,
        actor_module: TokenStatsModel,
        actor_optimizer: torch.optim.Optimizer | None = None,
        *,
        lr_schedule: LearningRateSchedule | None = None,
        vocab_size: int | None = None,
        extend_start: int | None = None,
        replace_token_id: int | None = None,
        packed: bool = True,
        mini_batch_rows: int | None = None,
        distill: DistillConfig | None = None,
        knows_extended: bool = False,
        extended_rows: ExtendedRows | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.actor_module = actor_module
        self.actor_optimizer = actor_optimizer
        self.lr_schedule = lr_schedule
        self.vocab_size = vocab_size
        self.extend_start = extend_start
        self.replace_token_id = replace_token_id
        self.packed = packed
        self.mini_batch_rows = mini_batch_rows
        self.distill = distill
        self.knows_extended = knows_extended
        self.extended_rows = extended_rows
        self.device = torch.device("cpu") if device is None else device
        self.dp_size = dist.get_world_size() if dist.is_initialized() else 1

    # ------------------------------------------------------------------ scoring

    def compute_log_prob(
        self, data: DataProto, calculate_entropy: bool = False, mask_special_token: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the response tokens.

        Args:
            data: rows with ``responses``, ``input_ids`` and ``attention_mask``; ``meta_info`` holds ``temperature``,
                ``use_dynamic_bsz`` and ``max_token_len`` or ``micro_batch_size``.
            calculate_entropy: give the entropy as well.
            mask_special_token: the teacher's way: ids it lacks (from ``vocab_size`` on) are replaced in what it reads,
                and where such an id is to be scored the result is ``config.ref_log_prob_replace_val``.

        Returns:
            (B, R) log-probs and (B, R) entropies or None, float32, on the CPU, 0 at padding.

        Raises:
            ValueError: ``mask_special_token`` without a vocabulary limit and a replacement.
        """
        options, input_ids = ScoreOptions(with_entropy=calculate_entropy), data.tensor("input_ids")
        if not mask_special_token:
            stats = self._score(data, input_ids, options)
            return stats.log_probs, stats.entropy
        if self.vocab_size is None or self.replace_token_id is None:
            raise ValueError("mask_special_token=True needs the actor's vocab_size and replace_token_id")
        stats = self._score(data, input_ids.masked_fill(input_ids >= self.vocab_size, self.replace_token_id), options)
        unknown = data.tensor("responses") >= self.vocab_size
        if "distill_special_token_mask" in data.batch:
            unknown |= data.tensor("distill_special_token_mask").bool()
        unknown &= real_response_tokens(data)
        return stats.log_probs.masked_fill(unknown, self.config.ref_log_prob_replace_val), stats.entropy

    def compute_token_stats(self, data: DataProto) -> TokenStats:
        """Log-prob, entropy and extended-vocabulary mass of the response tokens.

        Returns:
            `TokenStats` of (B, R) tensors, float32, on the CPU, 0 at padding; the mass is 0 without an extension.
        """
        options = ScoreOptions(with_entropy=True, extend_start=self.extend_start)
        stats = self._score(data, data.tensor("input_ids"), options)
        return stats if stats.extend_mass is not None else stats._replace(extend_mass=torch.zeros_like(stats.log_probs))

    @torch.no_grad()
    def _score(self, data: DataProto, input_ids: torch.Tensor, options: ScoreOptions) -> TokenStats:
        """Score every real response token of ``input_ids``."""
        options = options._replace(temperature=temperature_of(data), vocab_size=self.vocab_size)
        real = real_response_tokens(data)
        result = TokenStats(
            torch.zeros(real.shape),
            torch.zeros(real.shape) if options.with_entropy else None,
            torch.zeros(real.shape) if options.extend_start is not None else None,
        )
        rows = ScoredRows(input_ids, data.tensor("attention_mask"), real)
        self.actor_module.eval()
        for micro in rows.micro_batches(scoring_sizes(data), self.packed):
            for values, into in zip(self._forward(micro, options), result, strict=True):
                if values is not None and into is not None:
                    into[micro.rows, micro.columns] = values.float().cpu()
        reshard(self.actor_module)
        return result

    @torch.no_grad()
    def teach(self, taught: ScoredPositions, temperature: float) -> LinearTeacher:
        """Log-probs of this frozen model's ids at the scored positions; see `teachers.Teacher`.

        What it returns reads the gathered head: it is to be used before `reshard`.
        """
        assert self.vocab_size is not None, "a teacher's vocabulary is known"
        micro = taught.build(self.packed)
        input_ids = micro.inputs.input_ids
        if self.replace_token_id is not None:
            input_ids = input_ids.masked_fill(input_ids >= self.vocab_size, self.replace_token_id)
        read = micro._replace(inputs=micro.inputs._replace(input_ids=input_ids))
        self.actor_module.eval()
        hidden, weight = self._forward(read, _hidden_states)
        return LinearTeacher(hidden, weight, self.vocab_size, temperature)

    @torch.no_grad()
    def shared_head(self) -> torch.Tensor:
        """(vocab_size, D) the head as a forward pass has it, to be used before `reshard`; all ranks have to call it."""
        self.actor_module.eval()
        _, weight = self._forward(no_positions(self.packed), _hidden_states)
        return weight[: self.vocab_size].detach()

    def _forward(self, micro: MicroBatch, head: Head) -> Any:
        return self.actor_module(*micro.inputs.to(self.device), head)

    # ------------------------------------------------------------------ training

    def update_policy(
        self,
        data: DataProto,
        teachers: Sequence[tuple[Teacher, float]] = (),
        said: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Train on a batch: ``ppo_epochs`` passes, an optimizer step for every ``mini_batch_rows`` rows.

        A mini-batch without a trained token, or with a loss or gradient that is not finite, changes nothing; it still
        counts as a step of the learning-rate schedule.

        Args:
            data: rows with the keys of ``LOSS_KEYS``, with those of ``POLICY_KEYS`` unless the loss is a divergence
                alone, with ``ref_log_prob`` where the KL term is on, and with ``rollout_is_weights`` (B, R) where token
                losses are weighted; ``meta_info["temperature"]``.
            teachers: of an exact objective, and the weight of each one's rows; ``data["teacher"]`` says which of them
                a row belongs to.
            said: (B, R) zeros, filled with what these teachers say of the drawn tokens, at trained positions.

        Returns:
            metrics, the same on every rank: means over the optimizer steps, each over the whole mini-batch of all
            ranks. ``actor/loss`` is the whole loss, with all its terms; ``actor/updates``, the steps that were taken,
            and ``actor/skipped_updates``, those that were not because loss or gradient was not finite, are counts.
            Drifts are those behind the last step.

        Raises:
            ValueError: a frozen model, rows that do not divide into mini-batches, or trained padding.
        """
        config = self.config
        if not isinstance(config, FSDPActorConfig) or self.actor_optimizer is None or self.lr_schedule is None:
            raise ValueError("update_policy needs an actor with an optimizer and a schedule; this model is frozen")
        self._check_batch(data, config)
        rows = self.mini_batch_rows or len(data)
        steps: list[dict[str, float]] = []
        self.actor_module.train()
        for _ in range(config.ppo_epochs):
            for start in range(0, len(data), rows):
                mini, room = data.slice(start, start + rows), None if said is None else said[start : start + rows]
                steps.append(self._update_mini_batch(mini, config, teachers, room))
        reshard(self.actor_module)
        exact = self.distill is not None and self.distill.is_exact
        drift = {} if self.extended_rows is None else self.extended_rows.drift()
        return _summarise(steps, "actor/distill_loss" if exact else "actor/pg_loss") | drift

    def _check_batch(self, data: DataProto, config: FSDPActorConfig) -> None:
        has_policy_loss = self.distill is None or self.distill.has_policy_loss
        needed = (*LOSS_KEYS, *(POLICY_KEYS if has_policy_loss else ()))
        data.require(*needed, *(("ref_log_prob",) if config.use_kl_loss else ()))
        if self.mini_batch_rows is not None and len(data) % self.mini_batch_rows:
            raise ValueError(
                f"{len(data)} rows on this rank do not divide into mini-batches of {self.mini_batch_rows}; "
                "data.train_batch_size must be a multiple of actor_rollout_ref.actor.ppo_mini_batch_size"
            )
        if (data.tensor("response_mask").bool() & ~real_response_tokens(data)).any():
            raise ValueError("response_mask is 1 at padding, where attention_mask is 0; there is no token to train on")

    def _update_mini_batch(
        self,
        mini: DataProto,
        config: FSDPActorConfig,
        teachers: Sequence[tuple[Teacher, float]],
        said: torch.Tensor | None,
    ) -> dict[str, float]:
        """One optimizer step over this rank's rows of a mini-batch."""
        assert self.actor_optimizer is not None and self.lr_schedule is not None, "checked by update_policy"
        metrics = {"actor/lr": self.lr_schedule.rate} | dict.fromkeys(COUNTS, 0.0)
        mini_loss = self._loss_of(mini, config, teachers, said)
        if not mini_loss.is_empty:
            metrics |= self._accumulate_gradient(mini, mini_loss, config)
            step = clipped_step(
                self.actor_module, self.actor_optimizer, config.grad_clip, metrics["actor/loss"], self.extended_rows
            )
            metrics |= {"actor/grad_norm": step.grad_norm, COUNTS[0 if step.taken else 1]: 1.0}
        self.lr_schedule.advance()
        return metrics

    def _loss_of(
        self,
        mini: DataProto,
        config: FSDPActorConfig,
        teachers: Sequence[tuple[Teacher, float]],
        said: torch.Tensor | None,
    ) -> MiniBatchLoss | ExactDistillLoss | TaskAndDistillLoss:
        if self.distill is None or not self.distill.is_exact:
            return MiniBatchLoss(mini, config, self.device, self.dp_size, self.vocab_size)
        vocabulary = Vocabulary(self.vocab_size, self.extend_start)
        exact = ExactDistillLoss(mini, config, self.distill, teachers, vocabulary, self.device, self.dp_size, said)
        if not self.distill.coef:
            return exact
        task = MiniBatchLoss(mini, config, self.device, self.dp_size, self.vocab_size)
        return TaskAndDistillLoss(task, exact, self.distill.coef)

    def _accumulate_gradient(
        self,
        mini: DataProto,
        mini_loss: MiniBatchLoss | ExactDistillLoss | TaskAndDistillLoss,
        config: FSDPActorConfig,
    ) -> dict[str, float]:
        """Forward and backward over all micro-batches; the loss metrics of the whole mini-batch over all ranks."""
        sizes = BatchSizes(
            config.ppo_max_token_len_per_gpu if config.use_dynamic_bsz else None, config.ppo_micro_batch_size_per_gpu
        )
        rows = ScoredRows(mini.tensor("input_ids"), mini.tensor("attention_mask"), mini_loss.trained)
        totals: dict[str, torch.Tensor] = {}
        for micro in rows.micro_batches(sizes, self.packed):
            loss, values = mini_loss(micro, self._forward(micro, mini_loss.head(micro)))
            loss.backward()
            values = {**values, "actor/loss": loss.detach()}
            totals = {name: totals[name] + value if totals else value for name, value in values.items()}
        shares = torch.stack(list(totals.values()))
        if dist.is_initialized():
            dist.all_reduce(shares)
        return dict(zip(totals, (shares / self.dp_size).tolist(), strict=True))


def _hidden_states(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A head that computes nothing."""
    return hidden, weight


def with_scoring_limits(
    data: DataProto, use_dynamic_bsz: bool, max_token_len: int, micro_batch_size: int | None
) -> DataProto:
    """What scoring reads of a batch, with the micro-batch limits in ``meta_info`` under verl's names."""
    limits = {
        "use_dynamic_bsz": use_dynamic_bsz,
        "max_token_len": max_token_len,
        "micro_batch_size": micro_batch_size,
    }
    return DataProto.from_dict(
        {key: data.tensor(key) for key in SCORED_KEYS if key in data.batch}, None, data.meta_info | limits
    )


def scoring_sizes(data: DataProto) -> BatchSizes:
    """The micro-batch limits that `with_scoring_limits` put into a batch."""
    missing = {"use_dynamic_bsz", "max_token_len", "micro_batch_size"} - data.meta_info.keys()
    if missing:
        raise ValueError(f"the batch has no meta_info entries {sorted(missing)}; see with_scoring_limits")
    if data.meta_info["use_dynamic_bsz"]:
        return BatchSizes(data.meta_info["max_token_len"], None)
    return BatchSizes(None, data.meta_info["micro_batch_size"])


def real_response_tokens(data: DataProto) -> torch.Tensor:
    """(B, R) bool, True where a response has a token."""
    return data.tensor("attention_mask")[:, -data.tensor("responses").shape[1] :].bool()


def _summarise(steps: list[dict[str, float]], loss: str) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that have it; steps taken and skipped are counted."""
    names = {loss, "actor/loss", "actor/grad_norm"}.union(*steps)
    columns = {name: [step[name] for step in steps if name in step] for name in sorted(names)}
    means = {name: sum(values) / max(1, len(values)) for name, values in columns.items()}
    return means | {name: sum(columns[name]) for name in COUNTS}

"""The student on one data-parallel rank: scores tokens and is trained.

In:  a `DataProto` of rollouts with ``meta_info["temperature"]``, and a sharded `TokenStatsModel`. Out: log-probs,
entropies and extended-vocabulary mass (B, R), or an updated model and its metrics.

    update:  batch ─► mini-batches (one optimizer step each) ─► micro-batches (one forward and backward each)

Losses (``losses``) are divided by the counts of the whole mini-batch over all ranks, so the gradient does not depend on
how rows fall on ranks and micro-batches. All ranks make the same number of passes, because sharded models communicate
in each. A step clips the gradient over all ranks; weight decay touches matrices only.

Not here: advantages, teachers (``teachers``), moving models between host and GPU, which process is which rank.

Letters: B rows of this rank, M rows of a mini-batch, R response, S scored positions of a micro-batch.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from verl.config import DistillConfig, FSDPActorConfig, OptimizerConfig, RefConfig
from verl.ops.linear_log_prob import TokenStats, linear_token_stats
from verl.protocol import DataProto
from verl.utils.torch_functional import real_response_tokens
from verl.vocabulary import Vocabulary
from verl.workers.actor.losses import POLICY_TENSORS, ROW_KEYS, UPDATE_SCORES, Advantage, MiniBatchLoss, WeightedTeacher
from verl.workers.actor.router_loss import RouterLoss
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.fsdp.token_stats_model import BatchSizes, ScoredRows, TokenStatsModel, reshard
from verl.workers.fsdp.training_state import follow

LOSS_KEYS = ("responses", "response_mask", "input_ids", "attention_mask")
"""Batch keys of every update."""
SCORED_KEYS = ("responses", "input_ids", "attention_mask")
"""Batch keys of scoring; the rest need not travel."""
UPDATE_KEYS = (*LOSS_KEYS, *POLICY_TENSORS, *ROW_KEYS)
"""Batch keys of an update, where they are there."""
COUNTS = ("actor/updates", "actor/skipped_updates")
"""Optimizer steps that were taken, and those that were not because loss or gradient was not finite."""

Update = tuple[dict[str, float], torch.Tensor]
"""Metrics, and what ``UPDATE_SCORES`` names (5, B, R)."""


# ------------------------------------------------------------------ optimizer


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0).

    Warm-up rises linearly and reaches the peak in its last step; none of its steps is lost at 0. After it the rate is
    constant, or falls to ``min_lr_ratio * lr`` by the end of the run: linearly, or along half a cosine.
    """
    total, warmup, schedule = config.total_training_steps, config.lr_warmup_steps, config.lr_scheduler_type
    if warmup < 0:
        warmup = int(config.lr_warmup_steps_ratio * max(total, 0))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with its state in place from the start (zeros), as checkpoints need it.

    Fused: one kernel for each tensor in place of a dozen operations on shards, without temporary copies.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = config.betas[0], config.betas[1]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def clipped_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, loss: float, extended_rows: ExtendedRows | None
) -> tuple[float, bool]:
    """Clip the gradient to ``max_norm``, take the step, drop the gradient. Every rank returns the same.

    Args:
        loss: of all ranks together, so that all decide alike. It is checked in addition to the norm, because
            a loss that is not finite can have a finite gradient: that of ``x - inf`` is 1.
        extended_rows: of the model, which the step leaves alone where they are frozen.

    Returns:
        the norm of the gradient over all parameters and ranks, before clipping, and whether the step was taken. It is
        skipped where loss or norm is not finite: weights and optimizer are as they were, to the bit.
    """
    if extended_rows is not None:
        extended_rows.drop_gradient()
    # It clips at once: a norm that is not finite spoils the gradient, which is dropped below.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # adds up the shards: every rank takes part
    taken = bool(norm.isfinite()) and math.isfinite(loss)
    if taken:
        with nullcontext() if extended_rows is None else extended_rows.held():
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm), taken


# ------------------------------------------------------------------ the policy


@dataclass
class DataParallelPPOActor:
    """A policy on one rank; with an optimizer it can be trained.

    Args:
        config: the actor's settings, or the reference's for a frozen model.
        actor_module: the sharded model.
        actor_optimizer: None for a frozen model.
        vocabulary: of the policy.
        scoring_sizes: of micro-batches where nothing is trained.
        replace_token_id: input of a teacher in place of the ids that it lacks.
        mini_batch_rows: rows of this rank in one optimizer step; None: the whole batch.
        distill: the objective; by default the policy loss alone.
        advantage_part: distillation's part of an advantage, for batches whose ``old_log_probs`` an update gives.
        extended_rows: measures and, where they are frozen, holds the rows of the extended ids.
        averages: models that follow this one, by decay; some may come later.
    """

    config: FSDPActorConfig | RefConfig
    actor_module: TokenStatsModel
    actor_optimizer: torch.optim.Optimizer | None = None
    _: KW_ONLY
    vocabulary: Vocabulary
    scoring_sizes: BatchSizes = field(default_factory=lambda: BatchSizes(max_tokens=0, max_rows=1))
    replace_token_id: int | None = None
    mini_batch_rows: int | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    advantage_part: Advantage | None = None
    extended_rows: ExtendedRows | None = None
    averages: dict[float, TokenStatsModel] = field(default_factory=dict)
    optimizer_steps: int = 0
    """Taken so far, skipped ones among them: the only state of the learning rate, which follows ``config.optim``."""

    # ------------------------------------------------------------------ scoring

    def compute_log_prob(
        self, data: DataProto, calculate_entropy: bool = False, mask_special_token: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the response tokens, by verl's method; training uses `compute_token_stats` and `TeacherWorker`.

        Args:
            data: rows with ``responses``, ``input_ids`` and ``attention_mask``, and ``meta_info["temperature"]``.
            calculate_entropy: give the entropy as well.
            mask_special_token: score as a teacher that lacks the extended ids: its softmax runs over the shared ids,
                its input has ``replace_token_id`` in place of the others, and where one of these is to be scored the
                result is ``config.ref_log_prob_replace_val``.

        Returns:
            (B, R) log-probs and (B, R) entropies or None, float32, on the CPU, 0 at padding.

        Raises:
            ValueError: ``mask_special_token`` without a replacement.
        """
        input_ids, ids = data.tensor("input_ids"), self.vocabulary.ids
        if mask_special_token:
            if self.replace_token_id is None:
                raise ValueError("mask_special_token=True needs the actor's replace_token_id")
            ids = self.vocabulary.shared_ids()
            # The tokens to score are read from here too: an unknown one is scored as its replacement, masked below.
            input_ids = input_ids.masked_fill(input_ids >= ids, self.replace_token_id)
        stats = self._score(data, input_ids, Vocabulary(ids), calculate_entropy)
        if not mask_special_token:
            return stats.log_probs, stats.entropy
        unknown = data.tensor("responses") >= ids
        if "distill_special_token_mask" in data.batch:
            unknown |= data.tensor("distill_special_token_mask").bool()
        unknown &= real_response_tokens(data)
        return stats.log_probs.masked_fill(unknown, self.config.ref_log_prob_replace_val), stats.entropy

    def compute_token_stats(self, data: DataProto) -> dict[str, torch.Tensor]:
        """``old_log_probs``, ``entropys`` and ``extend_mass`` of the response tokens.

        Returns:
            (B, R) tensors, float32, on the CPU, 0 at padding; the mass is 0 without an extension.
        """
        stats = self._score(data, data.tensor("input_ids"), self.vocabulary, True)
        assert stats.entropy is not None and stats.extend_mass is not None, "`_score` begins with zeros"
        return {"old_log_probs": stats.log_probs, "entropys": stats.entropy, "extend_mass": stats.extend_mass}

    @torch.no_grad()
    def _score(
        self, data: DataProto, input_ids: torch.Tensor, vocabulary: Vocabulary, with_entropy: bool
    ) -> TokenStats:
        """Score every real response token of ``input_ids``, at the batch's temperature."""
        temperature = data.meta_info["temperature"]
        head = partial(linear_token_stats, temperature=temperature, vocabulary=vocabulary, with_entropy=with_entropy)
        real = real_response_tokens(data)
        result = TokenStats(*(torch.zeros(real.shape) for _ in TokenStats._fields))
        rows = ScoredRows(input_ids, data.tensor("attention_mask"), real)
        self.actor_module.eval()
        for micro in rows.micro_batches(self.scoring_sizes, self.actor_module.packed, self.actor_module.group):
            for values, target in zip(self.actor_module.run(micro, head), result, strict=True):
                if values is not None and target is not None:
                    target[micro.rows, micro.columns] = values.float().cpu()  # (S,) into (B, R)
        reshard(self.actor_module)
        for target in (target for target in result if target is not None):
            self.actor_module.group.add_up(target)
        return result if with_entropy else result._replace(entropy=None)

    # ------------------------------------------------------------------ training

    def update_policy(self, data: DataProto) -> dict[str, float]:
        """`update` of a policy without teachers; its metrics."""
        return self.update(data)[0]

    def update(self, data: DataProto, teachers: Sequence[WeightedTeacher] = ()) -> Update:
        """Train on a batch: ``ppo_epochs`` passes, an optimizer step for every ``mini_batch_rows`` rows.

        A mini-batch without a trained token, or with a loss or gradient that is not finite, changes nothing; it still
        counts as a step of the learning-rate schedule.

        Args:
            data: rows with the keys of ``LOSS_KEYS``; ``old_log_probs`` and ``advantages`` unless the loss is a
                divergence alone. ``old_log_probs`` may be absent if the batch is one optimizer step; the pass's own
                log-probs are used then, and ``advantage_part`` is added to ``advantages``. ``ref_log_prob`` for that
                and for the KL term; ``rollout_is_weights`` (B, R) where token losses are weighted; ``teacher`` (B,), a
                index into ``teachers``, where there are several; ``meta_info["temperature"]``.
            teachers: of a divergence objective, with the weight of each one's rows.

        Returns:
            metrics, the same on every rank: means over the optimizer steps, each over the whole mini-batch of all
            ranks. ``actor/loss`` is the whole loss, with all its terms; those of ``COUNTS`` are counts; drifts are
            measured after the last step. And (5, B, R) the log-probs and the like that ``UPDATE_SCORES`` names, as they
            were in the last epoch's passes, at trained positions; 0 elsewhere, and in rows of scores that the loss does
            not give (`MicroLoss.scores`).

        Raises:
            ValueError: a frozen model, or trained padding.
        """
        config = self.config
        if not isinstance(config, FSDPActorConfig) or self.actor_optimizer is None:
            raise ValueError("update_policy needs an actor with an optimizer; this model is frozen")
        data.require(*LOSS_KEYS)
        if (data.tensor("response_mask").bool() & ~real_response_tokens(data)).any():
            raise ValueError("response_mask is 1 at padding, where attention_mask is 0; there is no token to train on")
        rows = self.mini_batch_rows or len(data)
        assert len(data) % rows == 0, f"{len(data)} rows are no whole number of mini-batches of {rows}"
        if self.distill.has_policy_loss and config.ppo_epochs * len(data) != rows:
            data.require("old_log_probs")
        # There is no dropout (`load_config`): this switches on gradient checkpointing and activation offload alone.
        self.actor_module.train()
        updates = [
            self._update_mini_batch(data.slice(start, start + rows), config, teachers)
            for _ in range(config.ppo_epochs)
            for start in range(0, len(data), rows)
        ]
        reshard(self.actor_module)
        steps, scores = zip(*updates, strict=True)
        # Named here, so that they are logged, as 0, where no mini-batch has a trained token.
        own = "actor/distill_loss" if self.distill.is_divergence else "actor/pg_loss"
        names = {own, "actor/loss", "actor/grad_norm"}.union(*steps)
        columns = {name: [step[name] for step in steps if name in step] for name in sorted(names)}
        metrics = {name: sum(values) / max(1, len(values)) for name, values in columns.items()}
        metrics |= {name: sum(columns[name]) for name in COUNTS}
        if self.extended_rows is not None:
            metrics |= self.extended_rows.drift()
        return metrics, torch.cat(scores[-(len(data) // rows) :], dim=1)

    def _update_mini_batch(
        self, mini: DataProto, config: FSDPActorConfig, teachers: Sequence[WeightedTeacher]
    ) -> Update:
        """One optimizer step over this rank's M rows of a mini-batch."""
        assert self.actor_optimizer is not None, "checked by update"
        rate = learning_rate(config.optim, self.optimizer_steps)
        for group in self.actor_optimizer.param_groups:
            group["lr"] = rate
        metrics = {"actor/lr": rate} | dict.fromkeys(COUNTS, 0.0)
        scores = torch.zeros(len(UPDATE_SCORES), *mini.tensor("responses").shape)
        device = self.actor_module.device
        mini_loss = MiniBatchLoss(mini, config, self.vocabulary, device, self.distill, teachers, self.advantage_part)
        # The counts are over all ranks, so all of them run these passes, which communicate, or none does.
        if not mini_loss.is_empty:
            of_loss, scores = self._accumulate_gradient(mini, mini_loss, config)
            module, loss = self.actor_module, of_loss["actor/loss"]
            norm, taken = clipped_step(module, self.actor_optimizer, config.grad_clip, loss, self.extended_rows)
            metrics |= {"actor/grad_norm": norm, COUNTS[0 if taken else 1]: 1.0, **of_loss}
            for decay, average in self.averages.items() if taken else ():
                follow(average, module, decay)
        self.optimizer_steps += 1
        return metrics, scores

    def _accumulate_gradient(self, mini: DataProto, mini_loss: MiniBatchLoss, config: FSDPActorConfig) -> Update:
        """Forward and backward over all micro-batches; the metrics are those of the whole mini-batch over all ranks."""
        max_rows = None if config.use_dynamic_bsz else config.ppo_micro_batch_size_per_gpu
        sizes = BatchSizes(config.ppo_max_token_len_per_gpu, max_rows)
        rows = ScoredRows(mini.tensor("input_ids"), mini.tensor("attention_mask"), mini_loss.trained)
        scores = torch.zeros(len(UPDATE_SCORES), *mini_loss.trained.shape, device=self.actor_module.device)
        totals: dict[str, torch.Tensor] = {}
        packed, group = self.actor_module.packed, self.actor_module.group
        micros = rows.micro_batches(sizes, packed, group, mini_loss.teacher_lengths)
        coef = config.router_aux_loss_coef
        router_loss = RouterLoss(self.actor_module, micros, coef) if coef else None
        for number, micro in enumerate(micros, 1):
            if isinstance(self.actor_module, FSDPModule):  # copies of the model add up their gradients once
                self.actor_module.set_requires_all_reduce(number == len(micros))
            part = mini_loss(micro, partial(self.actor_module.run, micro), router_loss)
            # FSDP shards the gradient in every micro-batch: whole ones, added up, would take a model's memory.
            part.loss.backward()
            values = {**part.metrics, "actor/loss": part.loss.detach()}
            totals = {name: totals[name] + value if totals else value for name, value in values.items()}
            if part.scores is not None:
                scores[: len(part.scores), micro.rows, micro.columns] = part.scores.float()
        self.actor_module.group.add_up(scores)
        # By place: all ranks have the same metrics in the same order.
        shares = torch.stack(list(totals.values()))
        dist.all_reduce(shares)
        # Each holds the number of ranks as a factor, for FSDP averages gradients (`agg_loss`).
        shares = shares / dist.get_world_size()
        return dict(zip(totals, shares.tolist(), strict=True)), scores.cpu()

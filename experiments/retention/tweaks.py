"""Changes of a training step that no setting makes, for variants that are tried here before they become an option.

In: a trainer whose workers run in this process. Out: the same trainer with one method of its student, or its order of
prompts, replaced; nothing outside of this trainer changes. A variant names a key of `TWEAKS`.

Rows of items are those whose teacher knows the item tokens: the frozen student. All others are general rows.

Letters: N trained tokens of a mini-batch, S positions of one teacher, V ids.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from verl.ops.linear_divergence import FORWARD_KL, FULL, JSD, DivergenceStats, linear_divergence
from verl.ops.linear_log_prob import TeacherLogProbs
from verl.protocol import DataProto
from verl.trainer.data import Mixture, PromptStream
from verl.workers.actor import losses
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.losses import DivergenceLoss, MiniBatchLoss
from verl.workers.actor.teachers import ScoredPositions, Teacher

PERIOD = 4
"""Batches of ``alternate`` of which one is of items."""
UNCERTAIN = 0.2
"""Share of positions that ``uncertain-forward`` takes to be those where a teacher is uncertain."""
LEAK_ADVANTAGE = -1.0
"""Of an item token that the teacher lacks, in ``leak-penalty``."""
PROMPT_WEIGHT = 0.25
"""Of a token of a prompt beside one of its answer, in ``prompt-positions``."""

Compare = Callable[..., tuple[torch.Tensor, DivergenceStats]]
"""What is called in place of `linear_divergence`, with its arguments, for the positions of each teacher."""
Change = Callable[[DivergenceLoss], Compare]
"""Changes the loss of a mini-batch, and gives what it compares with."""


# ------------------------------------------------------------------ places in a trainer


def student_of(trainer: Any) -> DataParallelPPOActor:
    """The student of a trainer with its workers in this process."""
    return trainer.actor_wg._worker.actor


def copied(mini_loss: MiniBatchLoss) -> MiniBatchLoss:
    """The loss with parts of its own, whose attributes may be replaced."""
    mini_loss = copy.copy(mini_loss)
    mini_loss._parts = [(coef, copy.copy(part)) for coef, part in mini_loss._parts]
    return mini_loss


def change_divergence(actor: DataParallelPPOActor, change: Change) -> None:
    """Have every update of an exact objective minimise the changed loss."""
    accumulate = actor._accumulate_gradient

    def changed(mini: DataProto, mini_loss: MiniBatchLoss, config: Any) -> Any:
        mini_loss = copied(mini_loss)
        loss = mini_loss._parts[-1][1]  # where there is a divergence, it is the last part
        assert isinstance(loss, DivergenceLoss), "the objective has no divergence"
        # `DivergenceLoss.head` looks it up in its module when the forward pass reaches the head.
        with patch.object(losses, "linear_divergence", change(loss)):
            return accumulate(mini, mini_loss, config)

    actor._accumulate_gradient = changed  # type: ignore[method-assign]


def _require_all(positions: int, trained: int) -> None:
    if positions != trained:
        raise ValueError(
            f"{positions} of {trained} trained tokens lie in this micro-batch, and this variant ranks all of them; "
            "raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
        )


# ------------------------------------------------------------------ the loss


def items_by(kind: str, loss: DivergenceLoss) -> Compare:
    """Rows of items minimise another divergence; general rows keep theirs."""
    pairs = zip(loss._teachers, loss._options, strict=True)
    loss._options = [replace(options, kind=kind) if teacher.knows_extended else options for teacher, options in pairs]
    loss._gap_share = None  # an estimate of the reverse KL alone
    return linear_divergence


def half_of_tokens(loss: DivergenceLoss, *, even: bool = False) -> Compare:
    """Half of the general tokens count, those of the largest rank by entropy plus rank by divergence.

    The loss is the mean over the tokens that count, general ones and those of items: of them, items have a larger share
    than of all tokens. Metrics are over all tokens, as without the change.

    Args:
        even: general tokens that count weigh as much together as all of them would; items weigh what they did.
    """
    knows_extended = torch.tensor([teacher.knows_extended for teacher in loss._teachers])[loss._teacher_of]
    trained, general = int(loss._trained.sum()), int(loss._trained[~knows_extended].sum())
    kept = general - general // 2
    if even:
        loss._token_weights = torch.where(knows_extended[:, None], 1.0, general / max(1, kept)) * loss._token_weights
    else:
        loss._token_weights = loss._token_weights * (trained / max(1, trained - general + kept))

    def compare(hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, *rest: Any) -> Any:
        teacher, options, *others = rest
        if options.support == FULL:
            return linear_divergence(hidden, weight, weights, *rest)
        _require_all(len(hidden), general)
        with torch.no_grad():
            stats = linear_divergence(hidden, weight, weights, *rest)[1]
        weights = torch.where(upper_half(stats.entropy, stats.divergence), weights, 0.0)
        return linear_divergence(hidden, weight, weights, teacher, options, *others)

    return compare


def upper_half(*values: torch.Tensor) -> torch.Tensor:
    """(S,) bool: the half of the places, rounded up, with the largest sums of ranks over ``values`` (S,) each."""
    # argsort of a permutation is its inverse: from places in order of rank to the rank of each place.
    ranks = torch.stack([of.argsort(stable=True).argsort() for of in values]).sum(0)
    chosen = torch.zeros_like(ranks, dtype=torch.bool)
    chosen[ranks.topk(len(ranks) - len(ranks) // 2).indices] = True
    return chosen


class NotedLogProbs:
    """All log-probs of a teacher, and its entropy.

    Args:
        log_probs: (S, V).
    """

    def __init__(self, log_probs: torch.Tensor) -> None:
        self._log_probs = log_probs
        self.entropy = torch.special.entr(log_probs.exp()).sum(-1)
        """(S,) nats."""

    def __call__(self, rows: slice) -> torch.Tensor:
        """As `TeacherLogProbs`: callers overwrite what they get."""
        return self._log_probs[rows].clone()

    def at(self, places: torch.Tensor) -> TeacherLogProbs:
        """Those of some positions."""
        return NotedLogProbs(self._log_probs[places])


class _NotingTeacher:
    """A teacher whose log-probs of a micro-batch are noted."""

    def __init__(self, teacher: Teacher, noted: list[NotedLogProbs]) -> None:
        self._teacher, self._noted = teacher, noted

    def log_probs_at(self, positions: ScoredPositions, temperature: float) -> NotedLogProbs:
        log_probs = self._teacher.log_probs_at(positions, temperature)(slice(0, len(positions.rows)))
        assert isinstance(log_probs, torch.Tensor), "a teacher that runs in the update gives all its ids"
        self._noted.append(NotedLogProbs(log_probs))
        return self._noted[-1]


def uncertain_by_forward_kl(loss: DivergenceLoss) -> Compare:
    """Forward KL where the entropy of the row's teacher is among the largest, whichever teacher; elsewhere as set."""
    noted: list[NotedLogProbs] = []
    teachers: Any = [_NotingTeacher(teacher, noted) for teacher in loss._teachers]
    loss._teachers, loss._gap_share = teachers, None
    trained = int(loss._trained.sum())

    def compare(hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, *rest: Any) -> Any:
        teacher, options, labels, vocabulary = rest
        entropies = torch.cat([log_probs.entropy for log_probs in noted])
        _require_all(len(entropies), trained)
        is_uncertain = teacher.entropy > entropies.quantile(1 - UNCERTAIN)
        parts = [(is_uncertain.nonzero().flatten(), FORWARD_KL), ((~is_uncertain).nonzero().flatten(), options.kind)]
        results = [
            linear_divergence(
                hidden[at], weight, weights[at], teacher.at(at), replace(options, kind=kind), labels[at], vocabulary
            )
            for at, kind in parts
        ]
        order = torch.cat([at for at, _ in parts]).argsort()
        columns = zip(*(stats for _, stats in results), strict=True)
        total = torch.stack([value for value, _ in results]).sum()
        return total, DivergenceStats(*(torch.cat(values)[order] for values in columns))

    return compare


def compare_prompts_too(actor: DataParallelPPOActor) -> None:
    """Prompts of rows of items count too, from their second token on, PROMPT_WEIGHT as much as a token of an answer.

    Tokens of answers weigh what they did. The divergence in the metrics is the mean over all of these tokens.
    """
    update, accumulate = actor._update_mini_batch, actor._accumulate_gradient

    def changed(mini: DataProto, mini_loss: MiniBatchLoss, config: Any) -> Any:
        mini_loss = copied(mini_loss)
        loss, answers = mini_loss._parts[-1][1], mini.tensor("answer_mask").bool()
        assert isinstance(loss, DivergenceLoss), "the objective has no divergence"
        share = mini_loss.trained.sum() / answers.sum()
        loss._token_weights = loss._token_weights * torch.where(answers, share, share * PROMPT_WEIGHT)
        return accumulate(mini, mini_loss, config)

    def with_prompts(mini: DataProto, config: Any, teachers: Any) -> Any:
        real, answers = mini.tensor("attention_mask"), mini.tensor("response_mask")
        knows_extended = torch.tensor([teacher.knows_extended for teacher, _ in teachers])[mini.tensor("teacher")]
        # Rows begin at the left, so that each has its first token, and no more, before what is scored.
        begins, length = real.argmax(1, keepdim=True), real.shape[1]
        places = (torch.arange(length) + begins) % length
        of_prompts = (real.cumsum(1) > 1) & knows_extended[:, None]
        of_prompts[:, -answers.shape[1] :] = False
        of_answers = torch.nn.functional.pad(answers, (length - answers.shape[1], 0)).bool()
        ids, mask, trained, own = (
            of.gather(1, places) for of in (mini.tensor("input_ids"), real, of_prompts | of_answers, of_answers)
        )
        tensors = {"input_ids": ids, "attention_mask": mask, "teacher": mini.tensor("teacher")}
        tensors |= {"responses": ids[:, 1:], "response_mask": trained[:, 1:].long(), "answer_mask": own[:, 1:]}
        metrics, scores = update(DataProto.from_dict(tensors, meta_info=mini.meta_info), config, teachers)
        back = ((torch.arange(length) - begins) % length).expand(len(scores), -1, -1)
        return metrics, torch.nn.functional.pad(scores, (1, 0)).gather(2, back)[..., -answers.shape[1] :]

    actor._accumulate_gradient = changed  # type: ignore[method-assign]
    actor._update_mini_batch = with_prompts  # type: ignore[method-assign]


# ------------------------------------------------------------------ advantages and prompts


def penalise_leaks(trainer: Any) -> None:
    """An item token that the teacher lacks gets LEAK_ADVANTAGE in place of a clipped one, in update and metrics."""
    actor, missing = student_of(trainer), trainer.config.actor_rollout_ref.ref.ref_log_prob_replace_val
    part, add = actor.advantage_part, trainer.add_distillation
    assert part is not None, "the objective has no advantage"

    def penalised(data: DataProto, advantages: torch.Tensor) -> torch.Tensor:
        lacks = data.tensor("response_mask").bool() & (data.tensor("ref_log_prob") == missing)
        return advantages.masked_fill(lacks, LEAK_ADVANTAGE)

    def added(task: DataProto, batch: DataProto) -> DataProto:
        made = add(task, batch)
        return DataProto.from_dict({key: penalised(batch, made.tensor(key)) for key in ("advantages", "returns")})

    actor.advantage_part = lambda data: penalised(data, part(data))
    trainer.add_distillation = added


class Alternating(Mixture):
    """Batches of one group each: of PERIOD in turn the last is of items, the others are general."""

    def take(self, count: int) -> list[int]:
        """The places of the next batch."""
        turn = sum(of["given"] for of in self.state.values()) // count
        idle = [of for name, of in self.state.items() if name.startswith("rec") != (turn % PERIOD == PERIOD - 1)]
        behind = [of["behind"] for of in idle]
        for of in idle:
            of["behind"] = -math.inf
        places = super().take(count)
        for of, value in zip(idle, behind, strict=True):
            of["behind"] = value
        return places


def alternate(prompts: PromptStream) -> None:
    """Have the batches alternate; raises ValueError where there are not both kinds of groups."""
    if prompts.mixture is None or {name.startswith("rec") for name in prompts.mixture.state} != {True, False}:
        raise ValueError("alternate needs data.source_weights with rec_* and general_*")
    prompts.mixture.__class__ = Alternating


# ------------------------------------------------------------------ by name


def _of_loss(change: Change) -> Callable[[Any], None]:
    return lambda trainer: change_divergence(student_of(trainer), change)


TWEAKS: dict[str, Callable[[Any], None]] = {
    "items-forward": _of_loss(partial(items_by, FORWARD_KL)),
    "items-jsd": _of_loss(partial(items_by, JSD)),
    "tokens-half": _of_loss(half_of_tokens),
    "tokens-half-even": _of_loss(partial(half_of_tokens, even=True)),
    "uncertain-forward": _of_loss(uncertain_by_forward_kl),
    "prompt-positions": lambda trainer: compare_prompts_too(student_of(trainer)),
    "alternate": lambda trainer: alternate(trainer.prompts),
    "leak-penalty": penalise_leaks,
}
"""What each does to a trainer whose workers were started in this process."""

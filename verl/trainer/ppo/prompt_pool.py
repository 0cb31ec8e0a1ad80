"""Prompts that wait for a batch, with what is written of their answers already (``rollout.oversample``).

A batch asks more prompts than it trains on, and takes those whose answers have all ended first. The others wait for the
next batch, before fresh ones, with what they have; or they are dropped (``rollout.unfinished``)::

    data ──► waiting ──► asked ──► taken: trained on
                ▲                │
                └────────────────┴─► not taken

So in the long run a step reads one batch of the data. Without oversampling nothing waits: a batch of the data is asked
as it is.

In: a ``PromptStream``, answers. Out: batches. Not here: when a batch is begun (``rollout_queue``), and which answers
end first (``agent_loop.worker``).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import Generation
from verl.experimental.agent_loop.base import WRITTEN, Written
from verl.experimental.agent_loop.worker import ENDED, SEED_KEY, TAKEN, sample_seeds
from verl.protocol import DataProto
from verl.trainer.data import PromptStream
from verl.trainer.ppo.metric_utils import Metrics
from verl.utils.torch_functional import real_response_tokens


@dataclass(eq=False)
class _Read:
    """A batch of the data, ``n`` rows for each prompt."""

    rows: DataProto
    position: dict[str, Any]
    """In the data, before it."""
    number: int
    """From 1, over the whole run; tells two passes over a prompt apart."""


@dataclass(eq=False)
class Prompt:
    """One prompt of a batch of the data."""

    source: _Read
    place: int
    written: list[Written] = field(default_factory=list)
    """Of each of its answers; empty: none was begun."""


@dataclass(eq=False)
class Batch:
    """A batch of prompts on its way; after `PromptPool.keep_finished` those that are trained on."""

    prompts: DataProto
    asked: list[Prompt]
    step: int
    """The step that trains on it."""
    written_after: int
    """The step whose weights write its answers; 0: those of the start."""
    generation: Generation | None = None
    """None: not begun, or the answers come from a checkpoint."""
    answers: DataProto | None = None
    seconds: float = 0.0
    """How long the engines took; known with the answers."""
    tokens: int = 0
    """Tokens that this batch wrote, those of tools included; known with the answers."""
    metrics: Metrics = field(default_factory=dict)
    """Staleness of the answers that are taken, counts of the others; empty without oversampling."""
    scores: dict[int, Callable[[], DataProto]] = field(default_factory=dict)
    """Scores by teachers on ranks of their own, by the first of their rows; each call waits until they are there."""


class PromptPool:
    """See the module.

    Args:
        stream: the training prompts, at the checkpoint's position.
        prepare: makes a batch of rows, ``n`` answers to each and a ``step``, here the number of the batch.
    """

    def __init__(self, config: PPOConfig, stream: PromptStream, prepare: Callable[..., DataProto]) -> None:
        self._rollout, self._stream, self._prepare = config.actor_rollout_ref.rollout, stream, prepare
        self._wanted, self._n, self._seed = config.data.train_batch_size, self._rollout.n, config.data.seed
        self._asked = math.ceil(round(self._rollout.oversample * self._wanted, 6))  # 1.1 x 10 is a little above 11
        self._fresh, self._number = stream.batches(), 0
        self._waiting: list[Prompt] = []
        self.keeps_answers = not config.trainer.resume_allow_changed
        """Whether those of a checkpoint are used: under other settings there might be others."""

    def take(self, step: int, written_after: int) -> Batch:
        """The next batch, for ``step``: the prompts that have waited longest, then fresh ones."""
        while len(self._waiting) < self._asked:
            position, rows = self._stream.state_dict(), next(self._fresh)
            self._number += 1
            self._waiting += self._prompts(rows, position, self._number)
        taken, self._waiting = self._waiting[: self._asked], self._waiting[self._asked :]
        batch = self.batch_of(taken, step, written_after)
        if self._asked > self._wanted:
            batch.prompts.meta_info["wanted"] = self._wanted
            nothing: list[Written | None] = [None] * self._n
            written = [each for prompt in taken for each in prompt.written or nothing]
            batch.prompts.non_tensor_batch[WRITTEN] = np.fromiter(written, dtype=object)
        return batch

    def batch_of(self, prompts: list[Prompt], step: int, written_after: int) -> Batch:
        """These prompts as a batch."""
        parts = []
        for source, group in groupby(prompts, key=lambda prompt: prompt.source):
            part = source.rows[[prompt.place * self._n + answer for prompt in group for answer in range(self._n)]]
            part.meta_info = {}  # that of two sources differs
            parts.append(part)
        rows = parts[0] if len(parts) == 1 else DataProto.concat(parts)
        of_step = {"global_steps": step, "horizon": self._rollout.horizon.at(step)}
        rows.meta_info = max((prompt.source for prompt in prompts), key=lambda of: of.number).rows.meta_info | of_step
        return Batch(rows, prompts, step, written_after)

    def wait(self, prompts: Iterable[Prompt]) -> None:
        """Have these asked again, with what is written."""
        waiting = [*prompts, *self._waiting]
        self._waiting = sorted(waiting, key=lambda prompt: (prompt.source.number, prompt.place))

    def keep_finished(self, batch: Batch, answers: DataProto) -> None:
        """Cut a batch and its answers, in place, to the prompts whose answers were taken, and shuffle these.

        The others wait again with what is written, or are dropped (``rollout.unfinished``).
        """
        prompts, real = batch.prompts, real_response_tokens(answers)
        batch.tokens = int(real.sum())
        if TAKEN not in answers.non_tensor_batch:
            return
        taken, ended = (torch.from_numpy(answers.non_tensor_batch.pop(key).astype(bool)) for key in (TAKEN, ENDED))
        steps = torch.full_like(answers.tensor("responses"), batch.written_after)
        for row, written in enumerate(prompts.non_tensor_batch.pop(WRITTEN)):
            if written is not None:
                steps[row, : len(written.steps)] = torch.tensor(written.steps)
                batch.tokens -= int(real[row, : len(written.steps)].sum())
        age, lengths = (batch.step - 1 - steps)[taken][real[taken]].double(), real.sum(-1)
        others, carries = lengths[~taken].double(), self._rollout.carries
        batch.metrics = {
            "staleness/mean": age.mean().item(),
            "staleness/max": age.max().item(),
            "rollout/carried": float(len(others) * carries),
            "rollout/dropped": float(len(others) * (not carries)),
            "rollout/unfinished_tokens": lengths[~taken & ~ended].double().sum().item(),
        }
        if not carries:
            batch.metrics["rollout/dropped_length/mean"] = others.mean().item()
        log_probs = answers.tensor("rollout_log_probs") if "rollout_log_probs" in answers.batch else None

        def written_of(row: int) -> Written:
            tokens = real[row]
            kept = None if log_probs is None else log_probs[row][tokens].tolist()
            ids = answers.tensor("responses")[row][tokens].tolist()
            return Written(ids, kept, steps[row][tokens].tolist(), bool(ended[row]))

        for place, prompt in enumerate(batch.asked):
            rows = range(place * self._n, (place + 1) * self._n)
            prompt.written = [] if taken[rows[0]] else [written_of(row) for row in rows]
        if carries:
            self.wait(prompt for prompt in batch.asked if prompt.written)
        places = [place for place, prompt in enumerate(batch.asked) if not prompt.written]
        # Carried ones come first, and are the longer ones: the first mini-batch would have all of them.
        order = np.random.default_rng([self._seed, batch.step]).permutation(places)
        batch.asked = [batch.asked[place] for place in order]
        for rows_of in (prompts, answers):
            rows_of.reorder([place * self._n + answer for place in order for answer in range(self._n)])
        del prompts.non_tensor_batch[SEED_KEY], prompts.meta_info["wanted"]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the prompts that wait."""
        return {"read": self._number, "waiting": self.save(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the prompts of a checkpoint."""
        self._number = state["read"]
        self.wait(self.load(state["waiting"]))

    def save(self, prompts: Sequence[Prompt]) -> list[tuple[dict[str, Any], int, int, list[dict[str, Any]]]]:
        """Where each is in the data, and what is written; users' objects in them are read again."""
        facts = [(prompt, prompt.source) for prompt in prompts]
        return [(of.position, of.number, each.place, [vars(known) for known in each.written]) for each, of in facts]

    def load(self, saved: Sequence[tuple[dict[str, Any], int, int, list[dict[str, Any]]]]) -> list[Prompt]:
        """The prompts that were saved, read again; none where the data are others now."""
        after, prompts, read = self._stream.state_dict(), list[Prompt](), dict[int, list[Prompt]]()
        for position, number, place, known in saved:
            if position["data"] != after["data"]:
                continue
            if number not in read:
                self._stream.load_state_dict(position)
                read[number] = self._prompts(next(self._stream.batches()), position, number)
            prompts.append(read[number][place])
            # Without log-probs of its first tokens, where the run keeps them, an answer is begun anew.
            lacks = self._rollout.calculate_log_probs and any(each["log_probs"] is None for each in known)
            if self.keeps_answers and not lacks:
                prompts[-1].written = [Written(**each) for each in known]
        self._stream.load_state_dict(after)
        return prompts

    def _prompts(self, rows: dict[str, Any], position: dict[str, Any], number: int) -> list[Prompt]:
        prepared = self._prepare(rows, n=self._n, step=number)
        if self._asked > self._wanted:  # an answer that is carried on keeps its seed
            seeds = sample_seeds(self._rollout.seed, prepared)
            prepared.non_tensor_batch[SEED_KEY] = np.array(seeds, dtype=object)
        source = _Read(prepared, position, number)
        return [Prompt(source, place) for place in range(len(prepared) // self._n)]

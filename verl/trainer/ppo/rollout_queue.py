"""Batches whose answers are written while earlier ones are trained on (``trainer.max_staleness``).

With 1, each batch is written by the weights of one step before the last::

    engines   answer 1, 2 ─┐ sync ─► answer 3 ───────┐ sync ─► answer 4 ───────┐ sync
    ranks     (wait) train 1        (have 2) train 2          (have 3) train 3

With s, engines get weights once in s steps: all that they were asked is answered then, which is the next batch alone,
and s more are begun together. So weights never change in the middle of an answer, the batches of a period are 1 to s
steps stale, and which weights write which batch does not depend on how long anything takes. With 0 a batch is begun
when its step is, by the weights of the step before.

A checkpoint keeps answers that were not trained on, beside the place of their prompts in the data. Then a run that goes
on from it equals one that never stopped.

Where teachers have ranks of their own, they score the answers of each agent-loop worker as these come (``score``)::

    engines   ─ worker 0's rows ─┬─ worker 1's ─┬─ ...          (of a batch ahead: while another one trains)
    teachers                     └► score ──────┴► score ► ...  ► the batch's stage finds the scores

In: a ``PromptStream``, engines. Out: batches of prompts, the answers to them, and scores of these. Not here: when
weights are sent (the trainer asks ``is_low``).
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, Generation
from verl.protocol import DataProto
from verl.single_controller.base.decorator import RowBuffer
from verl.trainer.data import PromptStream
from verl.utils.timing import Timeline

Metrics = dict[str, float]
ANSWER_ROW = "answer_row"
"""Batch key: the row that an answer had when it came."""


@dataclass
class _Batch:
    prompts: DataProto
    position: dict[str, Any]
    """Of the prompts in the data, before these."""
    step: int
    """That trains on it."""
    written_after: int
    """The step whose weights write its answers; 0: those of the start."""
    generation: Generation | None = None
    """None: not begun, or the answers come from a checkpoint."""
    answers: DataProto | None = None
    seconds: float = 0.0
    """The engines took so long, known with the answers."""
    scores: dict[int, Callable[[], DataProto]] = field(default_factory=dict)
    """By the first of their rows; each waits until it is there."""


class RolloutQueue:
    """The batches behind the one that trains, as far as they are begun.

    Args:
        stream: the training prompts, at the checkpoint's position.
        prepare: makes a batch of rows, ``n`` answers to each and the number of its ``step``.
        engines: the manager, once there is one.
        total_steps: no batch behind this step is begun.
        saved: `state_dict` of the checkpoint; empty: the run starts, or nothing was begun.
    """

    def __init__(
        self,
        config: PPOConfig,
        stream: PromptStream,
        prepare: Callable[..., DataProto],
        engines: Callable[[], AgentLoopManager],
        timeline: Timeline,
        total_steps: int,
        saved: list[dict[str, Any]],
    ) -> None:
        self._most_ahead, self._stream, self._engines = config.trainer.max_staleness, stream, engines
        self._prepare = partial(prepare, n=config.actor_rollout_ref.rollout.n)
        self._timeline, self._total_steps = timeline, total_steps
        if saved and config.trainer.resume_allow_changed:
            # Under other settings there might be other answers: the same prompts are asked again.
            mixture = stream.mixture
            shares = mixture.shares if mixture is not None else {}
            stream.load_state_dict(saved[0]["position"], config.trainer.data_may_change)
            for name, share in shares.items():  # those that the last validation set
                assert mixture is not None, "it has shares"
                mixture.state[name]["share"] = share
            saved = []
        self._saved = saved
        self._training: _Batch | None = None
        self._ahead: list[_Batch] = []
        self._metrics: Metrics = {}
        """Of the step so far."""
        self._free_since = 0.0
        """When the engines had answered all they were asked, by ``time.time()``."""

    score: Callable[[DataProto], Callable[[], DataProto]] | None = None
    """Begins to score answered rows, to have their answers scored as they come; None: they are not."""

    @property
    def is_low(self) -> bool:
        """Whether engines are due for new weights: at most the next batch is left."""
        return len(self._ahead) <= 1

    def batches(self, done: int) -> Iterator[DataProto]:
        """Prompts of one step after the other, without end; begins those that come after them.

        Args:
            done: steps that were taken.
        """
        self._restore(done)
        stream, self._free_since = self._stream.batches(), time.time()
        for step in itertools.count(done + 1):
            if self.is_low:
                self._add_s("train/wait_s", time.time() - self._free_since)
                last = max(step, min(step + self._most_ahead, self._total_steps))
                for number in range(step + len(self._ahead), last + 1):
                    position, rows = self._stream.state_dict(), next(stream)
                    batch = _Batch(self._prepare(rows, step=number), position, number, written_after=step - 1)
                    if self._most_ahead:
                        self._begin(batch)
                    self._ahead.append(batch)
            self._training = self._ahead.pop(0)
            yield self._training.prompts

    def answers_to(self, prompts: DataProto) -> DataProto:
        """The answers to the batch that came last, or to others, which are asked now."""
        batch = self._training
        if batch is None or batch.prompts is not prompts or not (self._most_ahead or self.score):
            answers = self._engines().generate_sequences(prompts)
            self._free_since = time.time()
            return answers
        if batch.generation is None and batch.answers is None:
            self._begin(batch)
        answers, staleness = self._answers(batch), float(batch.step - 1 - batch.written_after)
        tokens = answers.tensor("attention_mask")[:, -answers.tensor("responses").shape[1] :].sum()
        self._metrics |= {"staleness/mean": staleness, "staleness/max": staleness}
        self._metrics["perf/generated_tokens_per_s"] = float(tokens) / batch.seconds
        if self.score is None:
            return answers
        starts = self._engines().starts(len(answers))
        for start, end in itertools.pairwise(starts if not batch.scores else []):  # they come from a checkpoint
            self._score_part(batch, start, answers.slice(start, end))
        return answers.union(DataProto.from_dict({ANSWER_ROW: torch.arange(len(answers))}))

    def scores_of(self, batch: DataProto) -> DataProto:
        """The scores of the batch that trains, which has an ``ANSWER_ROW``, in its order; waits for them."""
        assert self._training is not None and self._training.prompts is batch
        begun, buffer = self._training.scores, RowBuffer(len(batch))
        for start in sorted(begun):
            buffer.put(start, begun.pop(start)())
        scores = buffer.take()
        scores.reorder(batch.tensor(ANSWER_ROW))
        return scores

    def look(self) -> None:
        """Check that engines live, and have what they have answered of the batches ahead scored; returns at once."""
        self._engines().check_alive()
        for generation in [batch.generation for batch in self._ahead if batch.answers is None]:
            assert generation is not None, "a batch without answers was begun"
            self._engines().take(generation)

    def drain(self) -> None:
        """Wait until the engines have answered all that was begun."""
        for batch in self._ahead:
            self._answers(batch)

    def step_metrics(self) -> Metrics:
        """What was measured since the last call; nothing without ``max_staleness``."""
        metrics, self._metrics = {"rollout/wait_s": 0.0, "train/wait_s": 0.0} | self._metrics, {}
        return metrics if self._most_ahead else {}

    def state_dict(self) -> list[dict[str, Any]]:
        """What a resumed run needs of the batches ahead, whose answers are waited for."""
        return [
            {
                "position": batch.position,
                "written_after": batch.written_after,
                "tensors": dict(answers.batch.items()),
                "columns": {key: column.tolist() for key, column in answers.non_tensor_batch.items()},
                "meta_info": answers.meta_info,
                "seconds": batch.seconds,
            }
            for batch, answers in [(batch, self._answers(batch)) for batch in self._ahead]
        ]

    def _restore(self, done: int) -> None:
        """Read the prompts of a checkpoint's batches again, and put its answers to them."""
        after = self._stream.state_dict()
        for step, saved in enumerate(self._saved, done + 1):
            self._stream.load_state_dict(saved["position"])
            prompts = self._prepare(next(self._stream.batches()), step=step)
            answers = DataProto.from_dict(saved["tensors"], saved["columns"], saved["meta_info"])
            facts = saved["position"], step, saved["written_after"]
            self._ahead.append(_Batch(prompts, *facts, answers=answers, seconds=saved["seconds"]))
        if self._saved:
            self._stream.load_state_dict(after)

    def _begin(self, batch: _Batch) -> None:
        batch.generation = self._engines().begin(batch.prompts)
        if self.score is not None:
            batch.generation.give_on = partial(self._score_part, batch)

    def _score_part(self, batch: _Batch, start: int, part: DataProto) -> None:
        """Have the answers from row ``start`` on scored."""
        assert self.score is not None
        rows = batch.prompts.slice(start, start + len(part))
        batch.scores[start] = self.score(rows.union(DataProto(part.batch, part.non_tensor_batch)))

    def _answers(self, batch: _Batch) -> DataProto:
        """The answers of a batch; waits for them."""
        if batch.answers is None:
            assert batch.generation is not None, "a batch without answers was begun"
            asked_at, generation = time.time(), batch.generation
            batch.answers = self._engines().collect(generation)
            waited_s, batch.seconds = time.time() - asked_at, generation.seconds
            self._add_s("rollout/wait_s", waited_s)
            self._timeline.add("driver", "wait for answers", asked_at, waited_s)
            # Batches that are written side by side have a track each.
            track = f"engines {batch.step % (self._most_ahead + 1)}"
            self._timeline.add(track, f"answers of step {batch.step}", generation.began_s, generation.seconds)
            self._free_since = max(self._free_since, generation.began_s + generation.seconds)
        return batch.answers

    def _add_s(self, name: str, seconds: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + max(0.0, seconds)

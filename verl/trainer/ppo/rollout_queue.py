"""Batches whose answers are written while earlier ones are trained on (``trainer.max_staleness``).

With 1, each batch is written by the weights of one step before the last::

    engines   answer 1, 2 ─┐ sync ─► answer 3 ───────┐ sync ─► answer 4 ───────┐ sync
    ranks     (wait) train 1        (have 2) train 2          (have 3) train 3

With s, engines get weights every s steps, and before a validation. They first answer all that they were asked (at the
end of a period the next batch alone), then s more begin together. So weights never change in the middle of an answer,
the batches of a period are 1 to s steps stale, and which weights write which batch does not depend on how long anything
takes. With 0 a batch is begun when its step is, by the weights of the step before.

A checkpoint keeps answers that were not trained on, beside the place of their prompts in the data. Then a run that goes
on from it equals one that never stopped; with ``rollout.oversample``, where it is a matter of time which answers end
first, it loses no prompt and trains on none twice.

Where teachers have ranks of their own, they score the answers of each agent-loop worker as these come (``score``)::

    engines   ─ worker 0's rows ─┬─ worker 1's ─┬─ ...          (of a batch ahead: while another one trains)
    teachers                     └► score ──────┴► score ► ...  ► the batch's stage finds the scores

In: a ``PromptPool``, engines. Out: batches of prompts, the answers to them, and scores of these. Not here: when
weights are sent (the trainer asks ``is_low``).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.protocol import DataProto
from verl.single_controller.base.decorator import RowBuffer
from verl.trainer.data import PromptStream
from verl.trainer.ppo.metric_utils import Metrics
from verl.trainer.ppo.prompt_pool import Batch, PromptPool
from verl.utils.timing import Timeline


class RolloutQueue:
    """The batches after the one that trains, as far as they are begun.

    Args:
        stream: the training prompts, at the checkpoint's position.
        prepare: makes a batch of rows, ``n`` answers to each and the number of its ``step``.
        engines: the manager, once there is one.
        total_steps: no batch after this step is begun.
        saved: the driver's state in the checkpoint, `state_dict` among it; empty: the run starts.
    """

    def __init__(
        self,
        config: PPOConfig,
        stream: PromptStream,
        prepare: Callable[..., DataProto],
        engines: Callable[[], AgentLoopManager],
        timeline: Timeline,
        total_steps: int,
        saved: Mapping[str, Any],
    ) -> None:
        self._most_ahead, self._engines = config.trainer.max_staleness, engines
        self._pool, self._saved = PromptPool(config, stream, prepare), saved
        self._timeline, self._total_steps = timeline, total_steps
        self._training: Batch | None = None
        self._ahead: list[Batch] = []
        self._metrics: Metrics = {}
        """Metrics of the step so far."""
        self._free_since = 0.0
        """When the engines had answered all they were asked, by ``time.time()``."""

    score: Callable[[DataProto], Callable[[], DataProto]] | None = None
    """Begins to score finished rows, and returns what waits for the scores; None: `ref` scores the whole batch."""

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
        self._free_since = time.time()
        for step in itertools.count(done + 1):
            self._metrics = {}  # a checkpoint after the last step may have waited for answers, in no step's time
            if self.is_low:
                self._add_s("train/wait_s", time.time() - self._free_since)
                last = max(step, min(step + self._most_ahead, self._total_steps))
                for number in range(step + len(self._ahead), last + 1):
                    batch = self._pool.take(number, written_after=step - 1)
                    if self._most_ahead:
                        self._begin(batch)
                    self._ahead.append(batch)
            self._training = self._ahead.pop(0)
            yield self._training.prompts

    def answers_to(self, prompts: DataProto) -> DataProto:
        """The answers to ``prompts``: those of the batch that `batches` gave last may be begun already, others are not.

        With ``rollout.oversample``, ``prompts`` are cut, in place, to those whose answers have ended first.
        """
        batch = self._training if self._training and self._training.prompts is prompts else None
        if batch is None or not (self._most_ahead or self.score):
            began_s = time.time()
            answers = self._engines().generate_sequences(prompts)
            self._free_since = time.time()
            if batch is not None:
                self._pool.keep_finished(batch, answers)
                self._metrics |= batch.metrics
                if batch.metrics:  # more was written than is trained on
                    self._metrics["perf/generated_tokens_per_s"] = batch.tokens / (self._free_since - began_s)
            return answers
        if batch.generation is None and batch.answers is None:
            self._begin(batch)
        answers, staleness = self._answers(batch), float(batch.step - 1 - batch.written_after)
        if self._most_ahead:
            self._metrics |= {"staleness/mean": staleness, "staleness/max": staleness}
            self._metrics["perf/generated_tokens_per_s"] = batch.tokens / batch.seconds
        self._metrics |= batch.metrics
        if self.score is None:
            return answers
        starts = self._engines().starts(len(answers))
        for start, end in itertools.pairwise(starts if not batch.scores else []):  # they come from a checkpoint
            self._score_part(batch, start, answers.slice(start, end))
        return answers.union(DataProto.from_dict({"answer_row": torch.arange(len(answers))}))

    def scores_of(self, batch: DataProto) -> DataProto:
        """The scores of the batch that trains, which has an ``answer_row``, in its order; waits for them."""
        assert self._training is not None and self._training.prompts is batch
        begun, buffer = self._training.scores, RowBuffer(len(batch))
        for start in sorted(begun):
            buffer.put(start, begun.pop(start)())
        scores = buffer.take()
        scores.reorder(batch.tensor("answer_row"))
        return scores

    def poll(self) -> None:
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
        """What was measured of this step; nothing without ``max_staleness`` and ``rollout.oversample``."""
        waits = {"rollout/wait_s": 0.0, "train/wait_s": 0.0} if self._most_ahead else {}
        return waits | self._metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the batches ahead, whose answers are waited for, and of prompts that wait."""
        ahead = [
            {
                "prompts": self._pool.save(batch.asked),
                "written_after": batch.written_after,
                "tensors": dict(answers.batch.items()),
                "columns": {key: column.tolist() for key, column in answers.non_tensor_batch.items()},
                "meta_info": answers.meta_info,
                "seconds": batch.seconds,
                "tokens": batch.tokens,
                "metrics": batch.metrics,
            }
            for batch, answers in [(batch, self._answers(batch)) for batch in self._ahead]
        ]
        return {"ahead": ahead, "pool": self._pool.state_dict()}

    def _restore(self, done: int) -> None:
        """Read the prompts of a checkpoint again, and put its answers to them; not from other files."""
        pool, others = self._saved.get("pool", {"read": done, "waiting": []}), self._saved.get("other_files")
        self._pool.load_state_dict(pool | {"waiting": []} if others else pool)
        for step, saved in enumerate([] if others else self._saved.get("ahead", []), done + 1):
            prompts = self._pool.load(saved["prompts"])
            if not self._pool.keeps_answers:
                self._pool.wait(prompts)
                continue
            batch = self._pool.batch_of(prompts, step, saved["written_after"])
            batch.answers = DataProto.from_dict(saved["tensors"], saved["columns"], saved["meta_info"])
            batch.seconds, batch.tokens, batch.metrics = saved["seconds"], saved["tokens"], saved["metrics"]
            self._ahead.append(batch)

    def _begin(self, batch: Batch) -> None:
        batch.generation = self._engines().begin(batch.prompts)
        if self.score is not None:
            batch.generation.on_part = partial(self._score_part, batch)

    def _score_part(self, batch: Batch, start: int, part: DataProto) -> None:
        """Have the answers from row ``start`` on scored."""
        assert self.score is not None
        rows = batch.prompts.slice(start, start + len(part))
        batch.scores[start] = self.score(rows.union(DataProto(part.batch, part.non_tensor_batch)))

    def _answers(self, batch: Batch) -> DataProto:
        """The answers of a batch; waits for them."""
        if batch.answers is None:
            assert batch.generation is not None, "a batch without answers was begun"
            asked_at, generation = time.time(), batch.generation
            batch.answers = self._engines().collect(generation)
            self._pool.keep_finished(batch, batch.answers)
            waited_s, batch.seconds = time.time() - asked_at, generation.seconds
            self._add_s("rollout/wait_s", waited_s)
            self._timeline.add("driver", "wait for answers", asked_at, waited_s)
            # Batches that are written side by side have a track each.
            track = f"engines {batch.step % (self._most_ahead + 1)}"
            self._timeline.add(track, f"answers of step {batch.step}", generation.began_s, generation.seconds)
            self._free_since = max(self._free_since, generation.began_s + generation.seconds)
        return batch.answers

    def _add_s(self, name: str, seconds: float) -> None:
        if self._most_ahead:
            self._metrics[name] = self._metrics.get(name, 0.0) + max(0.0, seconds)

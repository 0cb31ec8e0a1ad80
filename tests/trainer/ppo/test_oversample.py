"""More prompts than a step trains on (``rollout.oversample``): queue, manager and worker on an engine that sleeps.

Its time is simulated, so which answers end first is known, and nothing waits.
"""

import copy
import importlib
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from verl.config import HorizonConfig
from verl.trainer.ppo import rollout_queue

sleeping: Any = importlib.import_module("benchmarks.sleeping_engines")


def log_normal(count: int, median: float, longest: int) -> list[int]:
    draw = random.Random(0)
    return [max(1, min(longest, round(draw.lognormvariate(math.log(median), 1.0)))) for _ in range(count)]


@pytest.fixture
def steps_over() -> Iterator[Callable[..., Any]]:
    """Makes steps, and ends their engines after the test."""
    made = []

    def make(lengths: list[int], batch: int, **settings: Any) -> Any:
        made.append(sleeping.Steps(lengths, batch, sleeping.LoopOfItsOwnTime(), **settings))
        return made[-1]

    yield make
    for steps in made:
        steps.manager.shutdown()


def check_answers(step: Any, lengths: list[int]) -> None:
    """Every answer is the one that is written in one go, and a token's log-prob tells its place and weights."""
    batch, index_of = step.answers.batch, step.prompts.array("index")
    rows = zip(index_of, batch["responses"], batch["rollout_log_probs"], step.lengths, strict=True)
    for index, ids, log_probs, length in rows:
        assert length == lengths[index] and ids[length - 1] == sleeping.END
        assert ids[: length - 1].tolist() == [sleeping.token_at(index, place) for place in range(length - 1)]
        versions = -log_probs[:length] - torch.arange(length)
        assert (versions.diff() >= 0).all() and versions[-1] >= 0
    assert batch["response_mask"].sum(1).tolist() == step.lengths
    assert not batch["distill_special_token_mask"].any()


def test_a_step_takes_the_prompts_that_end_first_and_the_next_goes_on_with_the_others(
    steps_over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of six: the answers of 50 and 9 tokens are cut after 7; the second ends 2 tokens later."""
    lengths = [3, 50, 5, 9, 7, 1, 1, 1, 1, 4, 60, 1, 1, 1, 2, 2]
    steps = steps_over(lengths, 4, oversample=1.5)
    steps.stream._config.shuffle = False
    monkeypatch.setattr(rollout_queue.time, "time", steps._loop.time)
    taken = list(steps.take(3))
    for step in taken:
        check_answers(step, lengths)
    assert [sorted(step.prompts.array("index")) for step in taken] == [[0, 2, 4, 5], [3, 6, 7, 8], [9, 11, 12, 13]]
    assert [step.seconds for step in taken] == pytest.approx([7, 2, 2])
    assert [step.metrics["rollout/carried"] for step in taken] == [2, 2, 2]
    assert [step.metrics["rollout/unfinished_tokens"] for step in taken] == [14, 11, 13]
    # Of the second step 7 of 9 + 1 + 1 + 1 tokens are those of the weights one step before.
    assert [step.metrics["staleness/mean"] for step in taken] == pytest.approx([0, 7 / 12, 2 / 7])
    assert [step.metrics["staleness/max"] for step in taken] == [0, 1, 1]
    # What is written for later steps counts: 3 + 7 + 5 + 7 + 7 + 1, then 2 + 2 + 1 + 1 + 1 + 2.
    assert [step.metrics["perf/generated_tokens_per_s"] for step in taken] == [30 / 7, 9 / 2, 9 / 2]


def test_carried_prompts_are_spread_over_the_mini_batches(steps_over: Any) -> None:
    """In an order that is that of the step, with the answers to a prompt side by side."""
    lengths, settings = log_normal(200, 20, 400), {"oversample": 1.5, "n": 2}
    first, second = (list(steps_over(lengths, 32, **settings).take(12)) for _ in range(2))
    in_order = [step.prompts.array("uid").tolist() for step in first]
    assert in_order == [step.prompts.array("uid").tolist() for step in second]
    assert all(uids[::2] == uids[1::2] for uids in in_order)
    versions = enumerate(-step.answers.batch["rollout_log_probs"][:, 0] for step in first)  # that began each answer
    places = [place / 64 for now, began in versions for place, version in enumerate(began) if version < now]
    assert len(places) > 100 and sum(places) / len(places) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_lost_or_trained_twice_over_resumes(steps_over: Any, max_staleness: int, n: int) -> None:
    lengths, saved, trained = log_normal(40, 8, 60), None, list[str]()
    settings = {"oversample": 1.25, "max_staleness": max_staleness, "n": n}
    for count in (3, 1, 4):
        steps = steps_over(lengths, 8, saved=saved, **settings)
        for step in steps.take(count):
            check_answers(step, lengths)
            assert len(step.answers) == 8 * n
            trained += step.prompts.array("uid").tolist()
        if max_staleness == 0:
            partial = [written for prompt in steps.queue._pool._waiting for written in prompt.written]
            assert any(written.token_ids and not written.has_ended for written in partial)
        stream = io.BytesIO()
        torch.save(steps.state_dict(), stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)
    prompts = steps.queue._pool._waiting + [prompt for batch in steps.queue._ahead for prompt in batch.asked]
    left = [f"{prompt.source.rows.array('index')[prompt.place * n]}-{prompt.source.number}" for prompt in prompts]
    assert set(Counter(trained).values()) == {n}
    assert len({*trained, *left}) == len(trained[::n] + left) == 8 * saved["pool"]["read"], "of all that were read"


def test_prompts_that_wait_are_read_again_from_older_passes_over_a_group(steps_over: Any) -> None:
    """Where shares may change, a position is one in a pass over each source: that over the first ten rows is short."""

    def waiting(steps: Any) -> list[tuple[int, int]]:
        prompts = steps.queue._pool._waiting
        return [(prompt.source.number, prompt.source.rows.array("index")[prompt.place]) for prompt in prompts]

    settings = {"oversample": 1.5, "source_weights": {"few": 0.4, "many": 0.6}}
    lengths = [*[1] * 9, 50, *log_normal(50, 8, 300)]
    steps = steps_over(lengths, 8, **settings)
    for _ in steps.take(12):
        again = steps_over(lengths, 8, saved=steps.state_dict(), **settings)
        again.queue._restore(steps.done)
        assert waiting(again) == waiting(steps)
        fresh, expected = (next(copy.deepcopy(each.stream).batches())["index"].tolist() for each in (again, steps))
        assert fresh == expected


def test_with_settings_that_may_have_changed_prompts_are_asked_anew(steps_over: Any) -> None:
    lengths = log_normal(40, 8, 60)
    first = steps_over(lengths, 8, oversample=1.5, max_staleness=1)
    trained = [uid for step in first.take(2) for uid in step.prompts.array("uid")]
    saved = first.state_dict()
    waiting = len(saved["pool"]["waiting"]) + len(saved["ahead"][0]["prompts"])
    second = steps_over(lengths, 8, saved=saved)
    second.queue._pool.keeps_answers = False
    [step] = second.take(1)
    check_answers(step, lengths)
    assert len(second.queue._pool._waiting) == waiting - 8 and not set(trained) & set(step.prompts.array("uid"))
    assert (step.answers.batch["rollout_log_probs"][:, 0] == -2).all(), "by the weights that the engine has now"


STEPS, WARMUP, BATCH = 50, 10, 64


def run_log_normal(steps_over: Any, **settings: Any) -> tuple[float, float, list[Any], float]:
    """Mean seconds of a step, mean trained length, steps, and the mean of the lengths that there are."""
    lengths = log_normal(BATCH * STEPS // 2, 20, 400)
    steps = list(steps_over(lengths, BATCH, **settings).take(WARMUP + STEPS))[WARMUP:]
    trained = [length for step in steps for length in step.lengths]
    return sum(s.seconds for s in steps) / STEPS, sum(trained) / len(trained), steps, sum(lengths) / len(lengths)


def test_steps_are_shorter_for_as_many_tokens_and_carried_answers_are_as_long_as_any(steps_over: Any) -> None:
    whole_s, whole, _, mean = run_log_normal(steps_over)
    assert whole == pytest.approx(mean, rel=0.02)
    carried_s, carried, steps, _ = run_log_normal(steps_over, oversample=1.25)
    assert carried == pytest.approx(mean, rel=0.02)
    assert carried_s / carried < 0.7 * whole_s / whole
    assert {step.metrics["rollout/carried"] for step in steps} == {16.0}
    dropped_s, dropped, steps, _ = run_log_normal(steps_over, oversample=1.25, unfinished="drop")
    assert dropped < 0.8 * mean and dropped_s < whole_s
    for step in steps:
        assert step.metrics["rollout/dropped"] == 16 and step.metrics["staleness/max"] == 0
        assert step.metrics["rollout/dropped_length/mean"] > sum(step.lengths) / BATCH, "the bias shows"


def test_an_answer_carried_under_a_shorter_horizon_is_cut_there(steps_over: Any) -> None:
    steps = steps_over([30, 3, 4, 9, 2, 2], 2, oversample=2.0, horizon=HorizonConfig(start=30, end=2, steps=1))
    steps.stream._config.shuffle = False
    first, second = steps.take(2)
    assert [sorted(step.prompts.array("index")) for step in (first, second)] == [[1, 2], [0, 3]]
    assert (sorted(first.lengths), second.lengths) == ([3, 4], [2, 2]), "both had 4 tokens"
    assert second.answers.batch["response_mask"].sum(1).tolist() == [2, 2]

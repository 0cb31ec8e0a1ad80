"""Generation beside training, on engines and an update that take their time: order, staleness, resume, figures."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.file_faults import Killed, killed_in_step
from support.loop_fakes import Engines, Prompts, Ranks, make_config, make_trainer

from verl.protocol import DataProto

STEPS = 7


class SlowRanks(Ranks):
    """An update adds 1 to the weights, which a checkpoint keeps."""

    def __init__(self, log: list[str], seconds: float) -> None:
        super().__init__(log)
        self.seconds, self.weights, self.seen = seconds, 0, list[Any]()
        self.watch: Callable[[], None] = lambda: None

    def update_actor(self, batch: DataProto) -> DataProto:
        rows = batch.array("index").tolist(), batch.array("uid").tolist(), batch.tensor("rollout_log_probs").tolist()
        self.seen.append((self.weights, *rows))
        self.watch()
        time.sleep(self.seconds)
        self.watch()
        self.weights += 1
        return super().update_actor(batch)

    def load_checkpoint(self, path: str) -> None:
        super().load_checkpoint(path)
        self.weights = int((Path(path) / "model").read_text())


@dataclass
class Writing:
    answers: DataProto
    version: int
    ended: threading.Event = field(default_factory=threading.Event)
    began_s: float = field(default_factory=time.time)
    seconds: float = 0.0
    given: int = 0
    on_part: Callable[[int, DataProto], None] = lambda start, part: None


class SlowEngines(Engines):
    """Answers are begun, and written with the weights of the last sync: log-probs tell them, and the first row."""

    def __init__(self, log: list[str], seconds: float) -> None:
        super().__init__(log)
        self.seconds, self.weights, self.running = seconds, 0, 0

    def begin(self, prompts: DataProto) -> Writing:
        name = "validation" if prompts.meta_info["validate"] else prompts.meta_info["global_steps"]
        self.log.append(f"begin {name}")
        written = super().generate_sequences(prompts)
        assert self.log.pop() == "generate"
        written.batch["rollout_log_probs"] -= self.weights
        writing = Writing(written, self.weights)
        self.running += 1

        def end() -> None:
            self.running -= 1
            self.log.append(f"end {name}")
            writing.ended.set()

        threading.Timer(self.seconds, end).start()
        return writing

    def starts(self, rows: int) -> list[int]:
        return [0, 1, rows]

    def check_alive(self) -> None:
        """They live."""

    def take(self, writing: Writing) -> None:
        """The first row is there at once."""
        there = 2 if writing.ended.is_set() else 1
        for start, end in list(pairwise(self.starts(len(writing.answers))))[writing.given : there]:
            writing.on_part(start, writing.answers.slice(start, end))
            writing.given += 1

    def collect(self, writing: Writing) -> DataProto:
        assert writing.ended.wait(60)
        self.take(writing)
        writing.seconds = self.seconds or 1e-3
        return writing.answers

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        return self.collect(self.begin(prompts))

    def update_weights(self, worker_group: Any) -> None:
        assert not self.running, "weights would change in the middle of an answer"
        super().update_weights(worker_group)
        self.weights = worker_group.weights

    def sleep(self) -> None:
        """They keep their memory."""


def trainer_of(
    folder: Path, max_staleness: int, seconds: tuple[float, float] = (0.0, 0.0), rows: int = 12, **settings: Any
) -> Any:
    """A trainer of 7 steps by default, on engines and an update that take so many seconds; three batches an epoch."""
    settings = {"total_training_steps": STEPS, "max_staleness": max_staleness, "device": "cpu", **settings}
    config = make_config(folder, **settings)
    config.actor_rollout_ref.rollout.calculate_log_probs = True
    trainer, log = make_trainer(config, train_dataset=Prompts(rows), val_dataset=Prompts(2))
    trainer.agent_loop_manager = SlowEngines(log, seconds[0])
    trainer.actor_wg = SlowRanks(log, seconds[1])
    trainer.role_groups = {"actor": trainer.actor_wg, "ref": trainer.actor_wg}
    trainer.log = log
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [data[name] for _, data in trainer.logger.lines if name in data]


@pytest.mark.parametrize(
    ("max_staleness", "expected"), [(1, [0, 1, 1, 1, 1, 1, 1]), (2, [0, 1, 2, 1, 2, 1, 2]), (3, [0, 1, 2, 3, 1, 2, 3])]
)
def test_engines_write_the_next_batches_while_one_trains(tmp_path: Path, max_staleness: int, expected: Any) -> None:
    trainer = trainer_of(tmp_path, max_staleness, seconds=(0.1, 0.05))
    trainer.fit()
    log = trainer.log
    updates = [place for place, event in enumerate(log) if event == "update"]
    begins = [log.index(f"begin {step}") for step in range(1, STEPS + 1)]
    for step in range(1, STEPS):
        assert begins[step] < updates[step - 1], "a batch is begun before the update of the one before it ends"
    for step, begin in enumerate(begins, 1):
        trained = sum(update < begin for update in updates)
        assert step - trained - 1 <= max_staleness, "at most so many are ahead of the one that trains"
    assert logged(trainer, "staleness/max") == logged(trainer, "staleness/mean") == expected
    for number, (weights, _, _, log_probs) in enumerate(trainer.actor_wg.seen):
        # -1.5 by the fake engine, and 1 less with each update in its weights.
        assert weights == number and log_probs[0][0] == -1.5 - (number - expected[number])
    assert log.count("sync") == (STEPS if max_staleness == 1 else len([s for s in expected if s == 1]) + 1)


def test_without_staleness_stages_take_turns(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 0)
    trainer.fit()
    turns = ["begin {}", "end {}", "ref_log_prob", "update", "sync"]
    assert trainer.log[1:] == [turn.format(step) for step in range(1, STEPS + 1) for turn in turns]
    assert [log_probs[0][0] for *_, log_probs in trainer.actor_wg.seen] == [-1.5 - step for step in range(STEPS)]
    assert not {"staleness/max", "rollout/wait_s", "train/wait_s"} & trainer.logger.lines[0][1].keys()


def test_without_validation_prompts_none_is_waited_for(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 3, test_freq=1)
    trainer.val_loader = None
    trainer.fit()
    assert trainer.log.count("sync") == 3, "after steps 1, 4 and 7"


def test_validation_waits_for_answers_and_has_the_newest_weights(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 2, seconds=(0.05, 0.0), test_freq=1)
    trainer.fit()
    log, open_batches = trainer.log, 0
    for place, event in enumerate(log):
        open_batches += event.startswith("begin") - event.startswith("end")
        if event == "begin validation":
            assert open_batches == 1, "of this validation alone"
            assert "update" not in log[max(i for i in range(place) if log[i] == "sync") : place]


@pytest.mark.parametrize(("max_staleness", "test_freq"), [(1, -1), (1, 2), (2, 2), (3, -1)])
def test_a_run_that_goes_on_with_batches_in_flight_is_the_run_that_never_stopped(
    tmp_path: Path, max_staleness: int, test_freq: int
) -> None:
    settings = {"max_staleness": max_staleness, "save_freq": 1, "test_freq": test_freq, "async_save": False}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.fit()
    seen, staleness, epochs = list[Any](), list[float](), list[float]()
    for killed_in in (3, 4, None):
        run = trainer_of(tmp_path / "run", **settings)
        with contextlib.suppress(Killed):
            killed_in_step(run, killed_in).fit()
        seen += run.actor_wg.seen
        staleness += logged(run, "staleness/mean")
        epochs += logged(run, "training/epoch")
    assert seen == whole.actor_wg.seen
    assert staleness == logged(whole, "staleness/mean")
    assert epochs == logged(whole, "training/epoch") == [0, 0, 0, 1, 1, 1, 2], "of the batch that trains"


def test_where_settings_may_have_changed_the_same_prompts_are_asked_again(tmp_path: Path) -> None:
    settings = {"max_staleness": 1, "save_freq": 1, "async_save": False}
    first = killed_in_step(trainer_of(tmp_path, **settings), 3)
    with pytest.raises(Killed):
        first.fit()
    second = trainer_of(tmp_path, **settings, resume_allow_changed=["algorithm.distill_adv_max_clip"])
    second.fit()
    rows = [index for _, index, *_ in (*first.actor_wg.seen, *second.actor_wg.seen)]
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(12)), "no prompt is lost or asked twice in an epoch"
    assert second.actor_wg.seen[0][3][0][0] == -1.5 - 2, "written anew, by the weights of the checkpoint"


def test_of_other_files_no_prompt_is_asked_in_place_of_one_that_was_ahead(tmp_path: Path) -> None:
    settings = {"max_staleness": 1, "save_freq": 1, "async_save": False}
    with pytest.raises(Killed):
        killed_in_step(trainer_of(tmp_path, **settings), 3).fit()
    second = trainer_of(tmp_path, **settings)
    assert second.driver_state["ahead"]
    second.driver_state["other_files"] = True
    second.rollouts._restore(2)
    assert second.rollouts._ahead == [] == second.rollouts._pool.state_dict()["waiting"]


def test_waits_and_the_timeline_say_who_waited_for_whom(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 1, seconds=(0.2, 0.0), total_training_steps=3, timeline=True)
    trainer.fit()
    waits = logged(trainer, "rollout/wait_s")
    assert all(wait > 0.1 for wait in waits[:2]) and waits[2] == 0, "nothing is begun after the last step"
    slow = trainer_of(tmp_path / "slow", 1, seconds=(0.0, 0.2), total_training_steps=3)
    slow.fit()
    assert len(logged(slow, "train/wait_s")) == 3 and logged(slow, "train/wait_s")[1] > 0.1, "engines wait for training"
    tokens = 4 * 2  # four rows of two tokens
    assert logged(trainer, "perf/generated_tokens_per_s") == pytest.approx([tokens / 0.2] * 3)
    text = (tmp_path / "timeline.json").read_text()
    events = json.loads(text.rstrip(",\n") + "]")
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert {"step", "gen", "update_actor", "update_weights", "wait for answers", "answers of step 3"} <= spans.keys()
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert tracks.keys() == {"driver", "engines 0", "engines 1"}
    assert spans["answers of step 3"]["tid"] == tracks["engines 1"] != tracks["driver"]
    assert spans["answers of step 3"]["dur"] == 200_000


def test_a_checkpoints_wait_is_in_no_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 2, seconds=(0.2, 0.0), save_freq=1, total_training_steps=4)
    trainer.fit()
    lines = [data for _, data in trainer.logger.lines]
    waits = [[of["rollout/wait_s"], of["timing_s/gen"], of.get("timing_s/update_weights", 0.0)] for of in lines]
    # The checkpoint after the third step has waited for the fourth's answers.
    assert all(wait <= generation + sync for wait, generation, sync in waits)


def test_a_timeline_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, 0, total_training_steps=2, timeline=True)
    (tmp_path / "timeline.json").mkdir()
    trainer.fit()
    assert trainer.global_steps == 2
    assert caplog.text.count("cannot be written") == 1


def test_importance_weights_are_those_of_the_version_that_wrote(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 1, total_training_steps=3)
    trainer.config.algorithm.rollout_correction = SimpleNamespace(rollout_is="token", rollout_is_threshold=4.0)
    trainer.fit()
    for step, batch in enumerate(trainer.actor_wg.updated, 1):
        # The policy's log-probs are -1 and -2, the sampler's -1.5 and 1 less with each update in its weights.
        writer = -1.5 - max(0, step - 2)
        expected = torch.tensor([-1.0 - writer, -2.0 - writer]).exp().clamp(max=4.0)
        torch.testing.assert_close(batch.batch["rollout_is_weights"][0, :2], expected)


# -------------------------------------------------------------------------------- teachers on ranks of their own


class Teacher(Ranks):
    """Scores a token by its row's number, once it is waited for."""

    def begin(self, method: str, rows: DataProto) -> Callable[[], DataProto]:
        assert method == "compute_ref_log_prob" and rows.tensor("responses").shape[1] == 3
        of_row = torch.from_numpy(rows.array("index").astype(float))
        self.log.append(f"score {rows.meta_info['global_steps']}, {len(rows)} rows")

        def wait() -> DataProto:
            self.log.append(f"scored {rows.meta_info['global_steps']}")
            return DataProto.from_dict({"ref_log_prob": -of_row[:, None].expand(-1, 3).float()})

        return wait


def trainer_with_teacher(*arguments: Any, **settings: Any) -> Any:
    apart = {"teacher_nnodes": 1, "teacher_n_gpus_per_node": 1}
    trainer = trainer_of(*arguments, **settings, **apart)
    trainer.role_groups["ref"] = Teacher(trainer.log)
    trainer.actor_wg.watch = trainer.rollouts.poll
    trainer.balance = lambda batch: batch.reorder([2, 0, 3, 1]) or batch
    return trainer


def scores_and_rows(trainer: Any) -> list[tuple[list[float], list[int]]]:
    batches = trainer.actor_wg.updated
    return [(batch.tensor("ref_log_prob")[:, 0].tolist(), batch.array("index").tolist()) for batch in batches]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_answers_are_scored_as_they_come_and_scores_go_with_their_rows(tmp_path: Path, max_staleness: int) -> None:
    trainer = trainer_with_teacher(tmp_path, max_staleness)
    trainer.fit()
    assert len(trainer.actor_wg.updated) == STEPS
    for scores, rows in scores_and_rows(trainer):
        assert scores == [-row for row in rows] and len(set(rows)) == 4
    expected = [event for n in range(1, STEPS + 1) for event in (f"score {n}, 1 rows", f"score {n}, 3 rows")]
    assert [event for event in trainer.log if event.startswith("score ")] == expected, "in the parts of the workers"


def test_the_batch_ahead_is_scored_while_one_trains(tmp_path: Path) -> None:
    trainer = trainer_with_teacher(tmp_path, 1, seconds=(0.05, 0.1), total_training_steps=4)
    trainer.fit()
    log = trainer.log
    updates = [place for place, event in enumerate(log) if event == "update"]
    for step in (3, 4):  # the second is written beside the first
        first, second = log.index(f"score {step}, 1 rows"), log.index(f"score {step}, 3 rows")
        assert first < log.index(f"end {step}") < second < updates[step - 2], "before the update before it ended"
        assert log.index(f"scored {step}") > updates[step - 2], "and waited for in its own step"


def test_a_run_that_goes_on_scores_answers_of_its_checkpoint_as_the_run_that_never_stopped(tmp_path: Path) -> None:
    settings = {"max_staleness": 1, "save_freq": 1, "async_save": False}
    whole = trainer_with_teacher(tmp_path / "whole", **settings)
    whole.fit()
    first = killed_in_step(trainer_with_teacher(tmp_path / "run", **settings), 3)
    with pytest.raises(Killed):
        first.fit()
    second = trainer_with_teacher(tmp_path / "run", **settings)
    second.fit()
    assert scores_and_rows(first) + scores_and_rows(second) == scores_and_rows(whole)
    parts = [event for event in second.log if event.startswith("score 3,")]
    assert parts == ["score 3, 1 rows", "score 3, 3 rows"]
    assert not [event for event in second.log if event.startswith("begin 3")], "its answers were in the checkpoint"


def test_hidden_states_of_batches_ahead_are_not_made(tmp_path: Path) -> None:
    """They are, within a step, of the batch that trains; and nothing is scored early beside the student."""
    trainer = trainer_with_teacher(tmp_path, 0)
    assert trainer.scores_as_they_come
    trainer.config.algorithm.distill.objective = "exact"
    assert trainer.exports_hidden_states and trainer.scores_as_they_come
    trainer.config.trainer.max_staleness = 1
    assert not trainer.scores_as_they_come
    trainer.config.algorithm.distill.objective = "topk"
    assert trainer.scores_as_they_come
    assert trainer_of(tmp_path, 1).rollouts.score is None

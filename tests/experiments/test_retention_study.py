"""A study that is killed goes on where it was; a run that fails is a result too."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.retention.__main__ import parse_args
from experiments.retention.results import (
    DONE,
    FAILED,
    Record,
    Run,
    append_result,
    read_results,
    record_of,
    runs_to_do,
)
from experiments.retention.study import Budget, Worker, run_study, stages_of

STAGES = stages_of("quickstart", ["exact", "sampled"], [0, 1], [0], [Budget(steps=5)])
ALL = [run for stage in STAGES for run in stage]


class Fake:
    """Makes runs at once, notes which, and ends the study where it is told to."""

    def __init__(self, made: list[Run], dies_of: Run | None = None, fails: Sequence[str] = ()) -> None:
        self.made, self.dies_of, self.fails = made, dies_of, fails
        self.stops, self.dead = 0, False

    def __call__(self, run: Run) -> Record:
        if run == self.dies_of or self.dead:
            self.dead = True
            raise KeyboardInterrupt
        self.made.append(run)
        if run.variant in self.fails:
            return record_of(run, FAILED, message="ValueError: no such key\nmore of it")
        return record_of(run, DONE, metrics={})

    def stop(self) -> None:
        self.stops += 1


def test_the_runs_are_teachers_then_students_then_every_variant_of_every_seed() -> None:
    stages = stages_of("w", ["a", "b"], [0, 1], [3, 4], [Budget(steps=5), Budget(seconds=2.5)])
    assert [[run.variant for run in stage] for stage in stages[:2]] == [["teacher"] * 2, ["before"] * 2]
    assert len(stages[2]) == len(set(stages[2])) == 2 * 2 * 2 * 2
    assert stages[2][0] == Run("w", 3, "a", 0, steps=5)
    assert stages[2][-1] == Run("w", 4, "b", 1, seconds=2.5)
    assert [stages[2][0].name, stages[2][-1].name] == ["w-student3-a-seed0-5steps", "w-student4-b-seed1-2.5s"]


def test_a_killed_study_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    results, made = tmp_path / "results.jsonl", list[Run]()
    first = Fake(made, dies_of=ALL[3])
    with pytest.raises(KeyboardInterrupt):
        run_study(STAGES, results, 1, lambda number: first)
    assert made == ALL[:3] and first.stops
    with open(results, "a") as file:
        file.write('{"run": {"world": "quick')  # the kill came in the middle of a line

    assert len(run_study(STAGES, results, 1, lambda number: Fake(made))) == len(ALL)
    assert made == ALL
    lines = [json.loads(line)["run"] for line in results.read_text().splitlines()]
    assert len(lines) == len(ALL) and {Run(**line) for line in lines} == {*ALL}
    run_study(STAGES, results, 2, lambda number: Fake(made))
    assert made == ALL, "nothing is made twice"


def test_a_failed_run_is_recorded_the_study_goes_on_and_the_next_tries_again(tmp_path: Path) -> None:
    results, made = tmp_path / "results.jsonl", list[Run]()
    records = run_study(STAGES, results, 1, lambda number: Fake(made, fails=["sampled"]))
    failed = {record["run"]["variant"]: record for record in records if record["status"] == FAILED}
    assert len(records) == len(ALL) and list(failed) == ["sampled"]
    assert failed["sampled"]["message"].startswith("ValueError")
    made.clear()
    records = run_study(STAGES, results, 1, lambda number: Fake(made))
    assert {run.variant for run in made} == {"sampled"} and len(made) == 2
    assert all(record["status"] == DONE for record in records), "the latest line of a run counts"


def test_nothing_is_distilled_of_a_student_that_could_not_be_made(tmp_path: Path) -> None:
    results, made = tmp_path / "results.jsonl", list[Run]()
    records = run_study(STAGES, results, 1, lambda number: Fake(made, fails=["teacher"]))
    assert made == ALL[:1] and [record["status"] for record in records] == [FAILED]
    assert len(run_study(STAGES, results, 1, lambda number: Fake(made))) == len(ALL), "the next study tries again"


def test_results_with_other_settings_or_lengths_are_not_taken_for_these(tmp_path: Path) -> None:
    run = Run("quickstart", 0, "exact", 0, steps=5)
    other = record_of(run, DONE, metrics={})
    other["settings"] |= {"actor_rollout_ref.actor.optim.lr": 1.0}
    assert runs_to_do([run], [other]) == [run]
    assert runs_to_do([run], [record_of(Run("quickstart", 0, "exact", 0, steps=6), DONE)]) == [run]
    assert runs_to_do([run], [json.loads(json.dumps(record_of(run, DONE)))]) == []


def test_results_of_other_models_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record_of(run, DONE, metrics={}) for run in ALL]
    assert runs_to_do(ALL, records) == []
    monkeypatch.setattr("experiments.retention.results.makers_digest", lambda: "of another source text")
    assert runs_to_do(ALL, records) == ALL


def test_runs_go_side_by_side(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=30)

    class Meets(Fake):
        def __call__(self, run: Run) -> Record:
            if not run.is_measurement:
                meeting.wait()  # passes only where two runs are under way at once
            return super().__call__(run)

    records = run_study(STAGES, tmp_path / "results.jsonl", 2, lambda number: Meets([]))
    assert len(records) == len(ALL)


def test_a_process_that_dies_is_a_failed_run_and_the_next_run_gets_another(tmp_path: Path) -> None:
    class Dying(Worker):
        def _start(self) -> "subprocess.Popen[str]":
            program = 'import sys, os; line = sys.stdin.readline(); os._exit(7) if "sampled" in line else print(line)'
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            return subprocess.Popen([sys.executable, "-c", program], **pipes)

    worker = Dying(0, tmp_path, 1)
    record = worker(Run("quickstart", 0, "sampled", steps=5))
    assert record["status"] == FAILED and "ended with code 7" in record["message"]
    assert worker(Run("quickstart", 0, "exact", steps=5))["variant"] == "exact"
    worker.stop()


def test_the_process_answers_with_a_record_and_ends_with_the_study(tmp_path: Path) -> None:
    worker = Worker(0, tmp_path, 2)
    record = worker(Run("nowhere", 3, "before"))
    assert record["status"] == FAILED and record["message"].startswith("ValueError: --world nowhere")
    assert "Traceback" in (tmp_path / "worker-0.log").read_text()
    process = worker._process
    assert process is not None and process.poll() is None, "it stays for the next run"
    worker.stop()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="stopped"):
        worker(Run("nowhere", 3, "before"))


def test_a_half_written_line_goes_when_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    assert read_results(path) == []
    append_result(path, record_of(ALL[0], DONE))
    with open(path, "a") as file:
        file.write('{"ru')
    assert len(read_results(path)) == 1
    append_result(path, record_of(ALL[1], DONE))
    assert [json.loads(line)["run"]["variant"] for line in path.read_text().splitlines()] == ["teacher", "before"]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_args(["--variants", "exact,sampled", "--seeds", "0,2", "--steps", "7", "--seconds", "3"])
    assert (args.variants, args.seeds, args.student_seeds) == (["exact", "sampled"], [0, 2], [0])
    assert args.budgets == [Budget(steps=7), Budget(seconds=3.0)]
    assert parse_args([]).budgets[0].steps
    with pytest.raises(SystemExit):
        parse_args(["--variants", "exct"])
    assert "exct is not one of public-fork, " in capsys.readouterr().err

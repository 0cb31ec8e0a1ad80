"""A study that is killed goes on where it was; a run that fails is a result too."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.retention.__main__ import parse_args
from experiments.retention.results import DONE, FAILED, Record, Run, record_of, runs_to_do
from experiments.retention.study import Budget, Worker, run_study, stages_of

STAGES = stages_of("quickstart", ["exact", "sampled"], [0, 1], [0], [Budget(steps=5)])
ALL = [run for stage in STAGES for run in stage]


class Fake:
    """Makes runs at once, keeps which, and is interrupted by the run ``dies_of``."""

    def __init__(self, made: list[Run], dies_of: Run | None = None, fails: Sequence[str] = ()) -> None:
        self.made, self.dies_of, self.fails, self.dead = made, dies_of, fails, False

    def __call__(self, run: Run) -> Record:
        if run == self.dies_of or self.dead:
            self.dead = True
            raise KeyboardInterrupt
        self.made.append(run)
        if run.variant in self.fails:
            return record_of(run, FAILED, message="ValueError: no such key\nmore of it")
        return record_of(run, DONE, metrics={})

    def stop(self) -> None:
        self.dead = True


def test_the_runs_are_teachers_then_students_then_every_variant_of_every_seed() -> None:
    *measured, runs = stages_of("w", ["a", "b"], [0, 1], [3, 4], [Budget(steps=5), Budget(seconds=2.5)])
    assert [[run.variant for run in stage] for stage in measured] == [["teacher"] * 2, ["before"] * 2]
    assert len(set(runs)) == 2 * 2 * 2 * 2
    assert [runs[0].name, runs[-1].name] == ["w-student3-a-seed0-5steps", "w-student4-b-seed1-2.5s"]


def test_a_killed_study_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    results, made = tmp_path / "deep" / "results.jsonl", list[Run]()
    first = Fake(made, dies_of=ALL[3])
    with pytest.raises(KeyboardInterrupt):
        run_study(STAGES, results, 1, lambda number: first)
    assert made == ALL[:3] and first.dead
    with open(results, "a") as file:
        file.write('{"run": {"world": "quick')  # the kill came in the middle of a line

    assert len(run_study(STAGES, results, 1, lambda number: Fake(made))) == len(ALL)
    assert made == ALL
    lines = [json.loads(line)["run"] for line in results.read_text().splitlines()]
    assert len(lines) == len(ALL) and {Run(**line) for line in lines} == {*ALL}
    run_study(STAGES, results, 2, lambda number: Fake(made))
    assert made == ALL, "nothing is made twice"


@pytest.mark.parametrize(("fails", "made_anyway"), [("sampled", len(ALL)), ("teacher", 1)])
def test_a_failed_run_is_a_result_and_tried_again_and_students_that_cannot_be_made_are_not_distilled(
    tmp_path: Path, fails: str, made_anyway: int
) -> None:
    results, made = tmp_path / "results.jsonl", list[Run]()
    records = run_study(STAGES, results, 1, lambda number: Fake(made, fails=[fails]))
    assert made == ALL[:made_anyway] and len(records) == made_anyway
    assert {record["run"]["variant"] for record in records if record["status"] == FAILED} == {fails}
    made.clear()
    records = run_study(STAGES, results, 1, lambda number: Fake(made))
    assert len(made) == (2 if fails == "sampled" else len(ALL))
    assert len(records) == len(ALL) and all(record["status"] == DONE for record in records), "the latest line counts"


def test_results_of_other_settings_lengths_or_models_are_not_taken_for_these(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("quickstart", 0, "exact", 0, steps=5)
    other, same = record_of(run, DONE), json.loads(json.dumps(record_of(run, DONE)))
    other["settings"] |= {"actor_rollout_ref.actor.optim.lr": 1.0}
    longer = record_of(Run("quickstart", 0, "exact", 0, steps=6), DONE)
    assert runs_to_do([run], [other, longer]) == [run] and runs_to_do([run], [same]) == []
    monkeypatch.setattr("experiments.retention.results.makers_digest", lambda: "of another source text")
    assert runs_to_do([run], [same]) == [run]


def test_a_process_that_dies_is_a_failed_run_and_the_next_run_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "from experiments.retention import worker; import os; worker.answer = lambda run, out, _: "
    program += "os._exit(7) if run.variant == 'sampled' else print('what libraries print') or [run.name, str(out)]; "
    command = [sys.executable, "-c", program + "worker.main()", str(tmp_path), "{}"]

    def start(worker: Worker) -> "subprocess.Popen[str]":
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(Worker, "_start", start)
    process = Worker(0, tmp_path, 1)
    record = process(Run("quickstart", 0, "sampled", steps=5))
    assert record["status"] == FAILED and "ended with code 7" in record["message"]
    for seed in (3, 4):
        answered = process(Run("w", seed, "before"))
        assert answered == [f"w-student{seed}-before", str(tmp_path)], "and nothing else comes in between"
    process.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        process(Run("nowhere", 3, "before"))


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_args(["--variants", "exact,sampled", "--seeds", "0,2", "--steps", "7", "--seconds", "3"])
    assert (args.variants, args.seeds, args.student_seeds) == (["exact", "sampled"], [0, 2], [0])
    assert args.budgets == [Budget(steps=7), Budget(seconds=3.0)]
    assert (args.ledger, parse_args(["--ledger"]).ledger, parse_args(["--ledger", "4"]).ledger) == (0, 10, 4)
    with pytest.raises(SystemExit):
        parse_args(["--ledger", "--seconds", "3"])
    assert "not with --seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--variants", "exct"])
    assert "exct is not one of public-fork, " in capsys.readouterr().err

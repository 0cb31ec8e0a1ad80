"""Which runs there are, and who makes them: processes side by side, each with its share of the cores.

::

    runs to do ──► one thread per process ──► worker (a process that stays warm) ──► results.jsonl
                        ▲                          │
                        └── next run ◄─────────────┘

In: what the command line asks for. Out: a line of results per run. Models that are tiny make poor use of a second
thread, so two processes of one thread each make more runs an hour than one of two.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from experiments.retention.results import (
    DONE,
    FAILED,
    Extras,
    Record,
    Run,
    append_result,
    read_results,
    record_of,
    run_of,
    runs_to_do,
)
from experiments.retention.variants import BEFORE, TEACHER

STOP_S = 10.0
"""How long a process may take to end before it is killed."""


@dataclass(frozen=True)
class Budget:
    """How long every run trains: steps, or seconds."""

    steps: int | None = None
    seconds: float | None = None


class Executor(Protocol):
    """Makes runs, one at a time."""

    def __call__(self, run: Run) -> Record:
        """The record of a run."""
        ...

    def stop(self) -> None:
        """End whatever is under way; may come from another thread."""
        ...


def stages_of(
    world: str,
    variants: Sequence[str],
    seeds: Sequence[int],
    student_seeds: Sequence[int],
    budgets: Sequence[Budget],
) -> list[list[Run]]:
    """The runs: first what teachers and then what students can do, which makes them, then all that is distilled.

    Variants come in turn, so that a study that is cut short has some of each.
    """
    return [
        *([Run(world, student, what) for student in student_seeds] for what in (TEACHER, BEFORE)),
        [
            Run(world, student, variant, seed, budget.steps, budget.seconds)
            for budget in budgets
            for student in student_seeds
            for seed in seeds
            for variant in variants
        ],
    ]


def run_study(
    stages: Sequence[Sequence[Run]], results: Path, jobs: int, make_executor: Callable[[int], Executor]
) -> list[Record]:
    """Make all runs that ``results`` does not have yet; returns what it has then.

    Args:
        stages: runs that may go side by side; a stage begins when the one before it has ended. Nothing is distilled
            of a student that could not be made.
        jobs: processes.
        make_executor: called once per process with its number.
    """
    executors: list[Executor] = []
    lacking: set[tuple[str, int]] = set()  # worlds and students that could not be made
    every = [run for stage in stages for run in stage]
    records = read_results(results)
    with tqdm(total=len(every), initial=len(every) - len(runs_to_do(every, records)), unit="run") as bar:
        bar.set_description(f"have {bar.n} of {len(every)}")
        try:
            for stage in stages:
                waiting = [run for run in runs_to_do(stage, records) if (run.world, run.student_seed) not in lacking]
                # Training alone is quick on several threads and rare: one process.
                wanted = 1 if any(run.is_measurement for run in waiting) else min(jobs, len(waiting))
                executors += [make_executor(number) for number in range(len(executors), wanted)]
                for record in _in_parallel(waiting, executors[:wanted]):
                    append_result(results, record)
                    _report(bar, record, len(every))
                    run = run_of(record)
                    if run.is_measurement and record["status"] == FAILED:
                        lacking.add((run.world, run.student_seed))
                records = read_results(results)
        finally:
            for executor in executors:
                executor.stop()
    return records


def _in_parallel(runs: Sequence[Run], executors: Sequence[Executor]) -> Iterator[Record]:
    """Records as they come. Left early, it ends what is under way first."""
    if not runs:
        return
    free = list(executors)
    lock = threading.Lock()

    def make(run: Run) -> Record:
        with lock:
            executor = free.pop()
        try:
            return executor(run)
        finally:
            with lock:
                free.append(executor)

    with ThreadPoolExecutor(max_workers=len(executors)) as threads:
        futures = [threads.submit(make, run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            if not all(future.done() for future in futures):
                for executor in executors:
                    executor.stop()


def _report(bar: tqdm, record: Record, total: int) -> None:
    bar.update(record["status"] == DONE)
    bar.set_description(f"have {bar.n} of {total}")
    if record["status"] == FAILED:
        tqdm.write(f"failed: {run_of(record).name}: {record['message'].splitlines()[0]}")


class Worker:
    """A process of `worker`, started when it is first needed and again where it died.

    Args:
        number: of the process; its log is ``worker-<number>.log``.
        out: folder of the study.
        jobs: processes that share the machine's cores.
        extras: what is measured besides.
    """

    def __init__(self, number: int, out: Path, jobs: int, extras: Extras | None = None) -> None:
        self._out, self._jobs, self._extras = out, jobs, extras or Extras()
        self._log = out / f"worker-{number}.log"
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def __call__(self, run: Run) -> Record:
        """Have the process make a run; a process that dies of it is a failed run."""
        if self._stopped:
            raise RuntimeError("the study was stopped")
        process = self._process = self._process or self._start()
        if self._stopped:  # meanwhile, by a caller who found no process to end
            self.stop()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        try:
            process.stdin.write(json.dumps(asdict(run)) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply.endswith("\n"):
            return json.loads(reply)
        code, self._process = process.wait(), None
        if self._stopped:
            raise RuntimeError("the study was stopped")
        return record_of(run, FAILED, message=f"its process ended with code {code}; {self._log} says why")

    def stop(self) -> None:
        """End the process; a second call does nothing."""
        self._stopped = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()

    def _start(self) -> subprocess.Popen[str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs)
        environment = os.environ | {
            "LOCAL_WORLD_SIZE": str(self._jobs),  # workers divide the cores by it
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        environment.setdefault("GOMP_SPINCOUNT", "10000")
        with open(self._log, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "experiments.retention.worker",
                    str(self._out),
                    json.dumps(asdict(self._extras)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the study, which ends it
            )

"""Start a distillation run as a user does, watch it, and read what it left behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.chat_files import chat, write_rows
from support.tiny_pairs import REPO, Pair

SCRIPT = "recipe/onpolicy_distill/run_qwen3_distill.sh"
OVERLAP = {"trainer.max_staleness": 1, "trainer.rollout_nnodes": 1, "trainer.rollout_n_gpus_per_node": 1}
"""Settings of a run whose one engine has a pool of its own, and writes the next batch while one trains."""
WORDS = ["copy", "reverse", "upper", "sort", "add", "count", "name", "list", "draw", "find"]


def write_onerec_parquet(path: Path, rows: int, sources: tuple[str, ...] = ("letters", "sums")) -> Path:
    """Chat rows in OneRec's layout, whose prompts differ, spread over the sources in turn."""
    questions = [f"{WORDS[row % 10]} {row} and {row * 7 % 50}" for row in range(rows)]
    named = [{"source": sources[row % len(sources)], "uuid": f"row-{row}"} for row in range(rows)]
    return write_rows(path, [chat(questions[row], str(row), **named[row]) for row in range(rows)])


def reference_launch(replaced: dict[str, str] | None = None) -> list[str]:
    """The arguments of tests/data/reference_launch.txt, with other values for some keys."""
    lines = (REPO / "tests/data/reference_launch.txt").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    keys = {key for key, _ in pairs}
    assert keys.issuperset(replaced or ()), f"not in the reference launch: {sorted((replaced or {}).keys() - keys)}"
    return [f"{key}={(replaced or {}).get(key, value)}" for key, value in pairs]


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What a run logged to ``metrics.jsonl``, by step."""
    merged: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        merged.setdefault(line["step"], {}).update(line["data"])
    return merged


def series(folder: Path, key: str) -> list[float]:
    """Values of one metric in step order, over the steps that have it."""
    return [data[key] for _, data in sorted(read_metrics(folder).items()) if key in data]


@dataclass
class Run:
    """A finished run."""

    folder: Path
    output: str
    returncode: int

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Logged metrics by step."""
        return read_metrics(self.folder)

    def series(self, key: str) -> list[float]:
        """Values of one metric in step order, over the steps that have it."""
        return series(self.folder, key)


def script_env(pair: Pair, train: Path) -> dict[str, str]:
    """Variables of the launch script for a pair and its training prompts."""
    return {
        "BASE_MODEL": str(pair.student),
        "TEACHER_MODEL": str(pair.teacher),
        "DATASET_PARQUET": str(train),
        "EXTEND_VOCAB_START_TOKEN": str(pair.extend_vocab_start_token),
    }


def small_run(engine: str, ranks: int, steps: int, **changes: Any) -> list[str]:
    """Overrides of a run of seconds that saves every other step; ``changes`` wins."""
    values = {
        "actor_rollout_ref.actor.optim.lr": 3e-4,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.total_training_steps": steps,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.name": engine,
        "data.max_prompt_length": 64,
        "data.max_response_length": 16,
        "data.train_batch_size": 8,
        "data.enable_think": True,
        "trainer.n_gpus_per_node": ranks,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": 2,
        "trainer.val_before_train": False,
        "trainer.logger": "[console,file]",
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def processes_of(session: int, group: bool = False) -> dict[int, str]:
    """Titles of the processes of a session of this machine, or of a process group, by process id; no zombies.

    A process stays in its session when its parent dies, and whatever it does to its title or environment.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, own_group, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if int(own_group if group else own_session) == session and state != "Z":
            found[int(folder.name)] = title
    return found


MEASURED = ("timing", "perf/")
"""Prefixes of metrics that the clock measures."""
ROUNDING = ("training/rollout_log_probs_diff", "distill/engine_gap")
"""Metrics of rounding itself: engines batch requests as they come, and a batch of another size rounds otherwise."""
OF_ONE_RUN = (*MEASURED, "rollout/wait_s", "train/wait_s", "training/restarts", "distill/teacher_canary", *ROUNDING)
"""Also waits, restarts and what only a step that saves has."""


def metrics_by_step(
    folder: Path, steps: int, without: tuple[str, ...] = OF_ONE_RUN, first: int = 1
) -> dict[int, dict[str, float]]:
    """A run's metrics, every step from the first once, but for those with the prefixes ``without``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(first, steps + 1))
    return {line["step"]: {k: v for k, v in line["data"].items() if not k.startswith(without)} for line in lines}


class Running:
    """A run in a session of its own, whose output goes to ``run.log`` in its folder; use it as a context.

    The launch script becomes the driver, unless it is to start the run again (``MAX_RESTARTS``).
    """

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._log = folder, folder / "run.log"
        with self._log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", str(REPO / SCRIPT), *overrides, f"trainer.default_local_dir={folder}"],
                cwd=folder,
                env={**os.environ, "ENV_DIR": sys.prefix, "WANDB_MODE": "offline", **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left, so that a test that fails leaves nothing behind."""
        for pid in processes_of(self.process.pid):  # the driver among them
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def output(self) -> str:
        """Its output so far."""
        return self._log.read_text()

    def processes(self, title: str) -> set[int]:
        """Those of its processes whose title begins so, as Ray's workers' do with their class."""
        return {pid for pid, own in processes_of(self.process.pid).items() if own.startswith(title)}

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 300) -> bool:
        """Poll until a condition holds; False where the driver ended before, or neither comes in time."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.01)
        return False

    def outliving(self, timeout_s: float, spared: tuple[str, ...] = ()) -> list[str]:
        """Titles of the processes that still run ``timeout_s`` after the driver's end."""
        deadline = time.monotonic() + timeout_s
        while left := [title for title in processes_of(self.process.pid).values() if not title.startswith(spared)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left

    def finish(self, timeout_s: float) -> Run:
        """Wait for the end of the driver, and then of all its processes."""
        returncode = self.process.wait(timeout_s)
        left = self.outliving(15)
        assert not left, f"{left} outlive the run:\n{self.output[-4000:]}"
        return Run(self.folder, self.output, returncode)


def launch(folder: Path, overrides: list[str], env: dict[str, str], *, code: int = 0, timeout_s: int = 600) -> Run:
    """Run the launch script to its end, which is to have this exit code; whatever it leaves behind, or has started when
    the time is up, is ended."""
    with Running(folder, overrides, env) as running:
        run = running.finish(timeout_s)
    assert run.returncode == code, run.output[-6000:]
    return run

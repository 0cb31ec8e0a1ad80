"""Kill a run again and again, resume it each time, and hold what comes out against a run that was never touched.

    make soak                                                # 20 kills over 30 steps
    make soak ARGS="--kills 3 --steps 6 --engine vllm"

A tiny student and teacher on the CPU, two ranks, a checkpoint every step, written beside the training. Kill k comes
once step k * steps / (kills + 1) is logged. SIGKILL goes to the driver, a rank and an engine in turn, after a random
wait: within a step, inside a save, or before the first step of a resumed run::

    start ─► wait for the moment ─► SIGKILL ─► the driver ends ─► nothing is left ─► every checkpoint reads ─► resume

The last line is one JSON object; the exit code is 0 if nothing in it is wrong. ``lost_steps`` are no fault: they were
logged, and taken again.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from support.launch import Run, launch_command, launch_environment, script_env, small_run, write_onerec_parquet
from support.processes import RAY_AGENTS, adopt_orphans, below, of_kind, wait_gone
from support.tiny_pairs import Pair, make_pair
from verl.config import TrainerConfig
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.checkpoint.manifest import find_faults
from verl.weight_sync.send import FOLDER_PREFIX, SHARED_MEMORY
from verl.workers.fsdp.shard_files import ShardReader

FAULTS = ("mismatches", "unreadable_checkpoints", "orphans", "shared_memory_left", "other")
VICTIMS = ("driver", "rank", "engine")
WHOLE, KILLED = "whole", "killed"
"""Folders of the run that is left alone, and of the one that is killed."""
CLOCK = ("timing", "perf/")
"""Beginnings of the names of figures that are measured by the clock."""
TOLERANCE = 1e-6
ROUNDING, ROUNDING_BOUND = ("training/rollout_log_probs_diff", "distill/engine_gap"), 1e-4
"""Figures of rounding itself: engines batch requests as they come, and a batch of another size rounds otherwise."""
PATIENCE_S = 300
"""How long a run may take to get to the moment of its kill, or to its end."""
WORKERS_GONE_S, AGENTS_GONE_S = 30, 90
"""After a driver ended: how long ranks, engines and Ray's servers may take to follow, and Ray's agents."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}


# ------------------------------------------------------------------ what a run left


def unreadable(root: Path) -> list[str]:
    """What is wrong with the checkpoints of a run's folder: one line for each that is not whole or cannot be read."""
    faults = []
    for folder in checkpoint.step_folders(root):
        found = find_faults(folder)
        try:
            found = found or read_whole(folder)
        except Exception as error:
            # Whatever goes wrong in reading is the finding.
            found = [f"{type(error).__name__}: {error}"]
        faults += [f"{folder.name}: {fault}" for fault in found]
    try:
        checkpoint.find_checkpoint(TrainerConfig(default_local_dir=str(root)))
    except ValueError as error:
        faults.append(str(error))
    return faults


def read_whole(folder: Path) -> list[str]:
    """Read every part of a checkpoint; says which tensors were not there."""
    shards, nan = ShardReader(folder / "actor" / "shards"), float("nan")
    tensors = {k: torch.full(tuple(e.size), nan, dtype=e.properties.dtype) for k, e in shards.tensors.items()}
    shards.read(tensors)
    torch.load(folder / checkpoint.DATA_STATE, weights_only=True)
    for path in folder.glob("actor/extra_rank_*.safetensors"):
        load_file(path)
    load_file(folder / "actor" / "huggingface" / "model.safetensors")
    return [f"{key} is not finite" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def logged_steps(root: Path) -> list[int]:
    """Steps of ``metrics.jsonl`` in its order; a last line that is not whole counts for nothing."""
    path = root / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def figures(of: Run) -> dict[int, dict[str, float]]:
    """What was logged of each step, without what the clock says."""
    return {step: {k: v for k, v in data.items() if not k.startswith(CLOCK)} for step, data in of.metrics.items()}


def differs(key: str, one: float, other: float) -> bool:
    """Whether two figures are further apart than their tolerance, relative or absolute."""
    tolerance = ROUNDING_BOUND if key.startswith(ROUNDING) else TOLERANCE
    return not abs(one - other) <= max(tolerance, tolerance * abs(one))


def mismatches(expected: Run, got: Run, steps: int) -> list[str]:
    """Where the resumed run is not the one that was never touched: figures of every step, and the last weights."""
    wrong = [] if logged_steps(got.folder) == list(range(1, steps + 1)) else ["metrics.jsonl has not every step once"]
    ours, theirs = figures(expected), figures(got)
    for step in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(step, {}), theirs.get(step, {})
        nan = float("nan")
        keys = [k for k in sorted(one.keys() | other.keys()) if differs(k, one.get(k, nan), other.get(k, nan))]
        wrong += [f"step {step}, {key}: {one.get(key)} and {other.get(key)}" for key in keys]
    last = f"global_step_{steps}/actor/huggingface/model.safetensors"
    weights, resumed = load_file(expected.folder / last), load_file(got.folder / last)
    wrong += [] if weights.keys() == resumed.keys() else ["other tensors"]
    off = [name for name in weights.keys() & resumed.keys() if (weights[name] - resumed[name]).abs().max() > TOLERANCE]
    return wrong + [f"weights of {name}" for name in sorted(off)]


# ------------------------------------------------------------------ one run after the other


@dataclass
class Report:
    """What happened, and what of it is wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    """By what was killed."""
    in_save: int = 0
    """Kills while a checkpoint was being written."""
    before_first_step: int = 0
    """Kills while a run started or resumed."""
    resumes: int = 0
    lost_steps: int = 0
    slowest_end_s: float = 0.0
    """From the kill of a rank or an engine to the end of the driver."""
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in FAULTS})

    def add(self, kind: str, lines: list[str]) -> None:
        """Note faults, and show them at once."""
        self.faults[kind] += lines
        for line in lines:
            print(f"{kind}: {line}", flush=True)

    def line(self, **more: Any) -> str:
        """The JSON line."""
        own = {name: value for name, value in vars(self).items() if name != "faults"}
        own |= {
            "kills": sum(self.kills.values()),
            "kills_of": self.kills,
            "slowest_end_s": round(self.slowest_end_s, 1),
        }
        return json.dumps({**own, **{kind: len(lines) for kind, lines in self.faults.items()}, **more})


class Driver:
    """One process that trains, from its start; ``with`` ends it and all that is below it."""

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._console = folder / "console.log"
        self._earlier_bytes = self._console.stat().st_size if self._console.exists() else 0
        with open(self._console, "ab") as output:
            self._process = subprocess.Popen(
                launch_command(folder, overrides),
                cwd=folder,
                env=launch_environment({**QUIET, "PYTHONUNBUFFERED": "1", **env}),
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in [] if self.has_ended() else [self.pid, *(process.pid for process in below(self.pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def end(self) -> int | None:
        """Wait for its end: its exit code, or None where it does not end."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(PATIENCE_S)
        return None

    def output(self) -> str:
        """What it said so far."""
        with open(self._console, "rb") as console:
            console.seek(self._earlier_bytes)
            return console.read().decode(errors="replace")

    def last_step(self) -> int:
        """The last step that it took; 0: none yet."""
        return max((int(step) for step in re.findall(r"^step (\d+) \|", self.output(), re.MULTILINE)), default=0)

    def resumed_at(self) -> int:
        """The step that it went on from; 0: it started afresh."""
        found = re.search(r"resumed from \S+ at step (\d+)", self.output())
        return int(found[1]) if found else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint lies there unfinished."""
        return any(self.folder.glob("global_step_*.unfinished"))

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Poll until a condition holds; False where the driver ended before, or neither comes."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has_ended() and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.005)
        return False


@dataclass
class Kill:
    """What is killed, and when."""

    victim: str
    moment: str
    """``start``: before the first step; ``step``: at any instant of a step; ``save``: while a checkpoint is written."""
    after_step: int
    """The first step after which ``step`` and ``save`` may be."""


def plan_kills(count: int, steps: int, rng: random.Random) -> list[Kill]:
    """Victims in turn, in an order drawn anew for each three; of the moments after the first, four in ten are saves."""
    victims = [victim for _ in range(0, count, len(VICTIMS)) for victim in rng.sample(VICTIMS, len(VICTIMS))]
    moments = ["save", *rng.choices(["step", "save", "start"], [4, 4, 2], k=count - 1)]
    return [Kill(victims[k], moments[k], (k + 1) * steps // (count + 1)) for k in range(count)]


class Soak:
    """A run that is killed, and one that is not.

    Args:
        folder: where both lie.
        overrides: of both.
        env: what the launch script is told.
    """

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str], rng: random.Random) -> None:
        self.report = Report()
        self._folder, self._overrides, self._env, self._rng = folder, overrides, env, rng
        self._reached = 0
        self._waits = {"start": 0.0, "step": 0.0, "save": 0.0}

    def leave_alone(self, name: str) -> Run:
        """A run, or the rest of one, from its start to its own end."""
        began = time.monotonic()
        with Driver(self._folder / name, self._overrides, self._env) as driver:
            driver.wait_until(lambda: driver.last_step() > 0)
            started_s = time.monotonic() - began
            status = driver.end()
        run = Run(driver.folder, driver.output(), -1 if status is None else status)
        if run.returncode:
            raise SystemExit(f"the run in {run.folder} ended with {status}:\n{run.output[-4000:]}")
        step_s = median(run.series("timing_s/step"))
        self._waits = {"start": started_s, "step": 2 * step_s, "save": step_s}
        if name == KILLED:
            self._note_resume(driver)
        self.report.add("orphans", wait_gone(driver.pid, AGENTS_GONE_S))
        return run

    def kill(self, kill: Kill) -> None:
        """Start the run, or go on with it, and end it by force."""
        wait_s = self._rng.uniform(0, self._waits[kill.moment])
        with Driver(self._folder / KILLED, self._overrides, self._env) as driver:
            pid = self._wait_for(kill, wait_s, driver)
            if pid is None:
                self.report.add("other", [f"{kill}: the moment did not come; {driver.output()[-2000:]}"])
                return
            in_save = driver.is_saving()
            with suppress(ProcessLookupError):  # it ended of itself, which the driver's end will tell
                os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            status = driver.end()
            took_s = time.monotonic() - began
            if not status:
                self.report.add("other", [f"{kill}: the driver ended with {status} after {took_s:.1f} s"])
            print(f"{kill}, in a save: {in_save}, at step {driver.last_step()}; ended after {took_s:.1f} s", flush=True)
        self.report.kills[kill.victim] += 1
        self.report.in_save += in_save
        self.report.before_first_step += driver.last_step() == 0
        self.report.slowest_end_s = max(self.report.slowest_end_s, took_s)
        self._note_resume(driver)
        self.report.add("orphans", wait_gone(driver.pid, WORKERS_GONE_S, RAY_AGENTS))
        self.report.add("unreadable_checkpoints", unreadable(driver.folder))

    def _wait_for(self, kill: Kill, wait_s: float, driver: Driver) -> int | None:
        """The process to kill, at the moment to kill it; None: that does not come."""

        def is_due() -> bool:
            has_come = kill.moment == "start" or driver.last_step() >= kill.after_step
            return has_come and (kill.moment != "save" or driver.is_saving())

        def is_time() -> bool:
            # A machine that was busier when the waits were measured must not let the run get away.
            latest = 1 if kill.moment == "start" else kill.after_step + 1
            is_over = time.monotonic() > until or driver.last_step() >= latest
            return is_over and bool(of_kind(kill.victim, driver.pid))

        if not driver.wait_until(is_due):
            return None
        until = time.monotonic() + wait_s
        return self._rng.choice(of_kind(kill.victim, driver.pid) or [None]) if driver.wait_until(is_time) else None

    def _note_resume(self, driver: Driver) -> None:
        """Count what a run took again of what earlier ones had logged, once it has got as far as that."""
        self.report.resumes += driver.resumed_at() > 0
        if driver.resumed_at() or driver.last_step():
            self.report.lost_steps += self._reached - driver.resumed_at()
            self._reached = max(driver.last_step(), driver.resumed_at())


# ------------------------------------------------------------------ the command line


def make_run(folder: Path, engine: str, steps: int) -> tuple[list[str], dict[str, str]]:
    """Tiny models and prompts, and the settings of a run on them."""
    pair: Pair = make_pair(*map(Path, build_tiny_tokenizers(folder / "tokenizers")), folder / "pair")
    train = write_onerec_parquet(folder / "train.parquet", 18)
    changes = {
        "trainer.save_freq": 1,
        "trainer.max_actor_ckpt_to_keep": 3,
        "data.cache_dir": folder / "cache",
        "actor_rollout_ref.rollout.cpu_kvcache_space_gb": 0.1,
    }
    return small_run(engine, 2, steps, **changes), script_env(pair, train)


def shared_memory() -> set[str]:
    """Weights that lie in shared memory."""
    return {path.name for path in SHARED_MEMORY.glob(f"{FOLDER_PREFIX}*")}


def main() -> int:
    """Run it all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one, which goes where all is well")
    args = parser.parse_args()
    began, rng = time.monotonic(), random.Random(args.seed)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-run-"))
    folder.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    memory = shared_memory()
    soak = Soak(folder, *make_run(folder, args.engine, args.steps), rng)
    whole = soak.leave_alone(WHOLE)
    for kill in plan_kills(args.kills, args.steps, rng):
        soak.kill(kill)
    killed = Run(folder / KILLED, "", 0)
    if checkpoint.newest_whole(killed.folder) != checkpoint.step_folder(killed.folder, args.steps):
        soak.leave_alone(KILLED)  # else the last kill came behind the last checkpoint, and there is nothing to train
    report = soak.report
    report.add("unreadable_checkpoints", unreadable(killed.folder))
    report.add("mismatches", mismatches(whole, killed, args.steps))
    report.add("shared_memory_left", sorted(shared_memory() - memory))
    if sum(report.kills.values()) != args.kills:
        report.add("other", [f"{sum(report.kills.values())} of {args.kills} kills"])
    is_well = not any(report.faults.values())
    if is_well and args.folder is None:
        shutil.rmtree(folder)
    elif not is_well:
        print(f"everything lies in {folder}", flush=True)
    settings = {"engine": args.engine, "steps": args.steps, "seed": args.seed}
    print(report.line(**settings, seconds=round(time.monotonic() - began)), flush=True)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())

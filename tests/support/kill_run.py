"""Kill a run again and again, resume it each time, and compare it with a run that was never touched.

    make soak                                                # 20 kills over 30 steps
    make soak ARGS="--kills 3 --steps 6 --engine vllm"
    make soak ARGS="--kills 10 --steps 20 --overlap"         # engines apart write the next batch while one trains

A tiny student and teacher on the CPU, two ranks, a checkpoint every step, written while training goes on. Kill k comes
once step k * steps / (kills + 1) is logged. SIGKILL goes to the driver, a rank and an engine in turn, after a random
wait: within a step, inside a save, or before the first step of a resumed run::

    start ─► wait for the moment ─► SIGKILL ─► the driver ends ─► no process is left ─► every checkpoint reads ─► resume

The last line is one JSON object; the exit code is 0 if it counts no fault.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median
from subprocess import TimeoutExpired
from typing import NamedTuple

import torch
from pytest import approx
from safetensors.torch import load_file

from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from support.launch import OVERLAP, Run, Running, metrics_by_step, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair, make_pair
from verl.trainer.checkpoint import layout
from verl.weight_sync import FOLDER_PREFIX, SHARED_MEMORY
from verl.workers.fsdp.checkpoint import ShardReader

FAULTS = ("mismatches", "unreadable_checkpoints", "orphans", "shared_memory_left", "other")
TITLES = {"rank": ("ray::WorkerHost",), "engine": ("ray::HFReplica", "ray::VLLMReplica", "VLLM::")}
"""How titles of the processes begin, by what they are."""
VICTIMS = ("driver", *TITLES)
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They hold no model and no port of the run, and wait a minute for Ray's head before they end after it."""
WHOLE, KILLED = "whole", "killed"
"""Folders of the run that is left alone, and of the one that is killed."""
TOLERANCE = 1e-6
PATIENCE_S = 300
"""How long a run may take to get to the moment of its kill, or to its end."""
WORKERS_GONE_S, AGENTS_GONE_S = 30, 90
"""How long after the driver's end ranks, engines and Ray's servers may take to end, and Ray's agents."""
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


# ------------------------------------------------------------------ what a run left


def unreadable(root: Path) -> list[str]:
    """What is wrong with the checkpoints of a run's folder: one line for each that is not whole or cannot be read."""
    faults = []
    for folder in layout.step_folders(root):
        try:
            found = layout.find_faults(folder) or read_whole(folder)
        except Exception as error:
            # Whatever goes wrong in reading is the finding.
            found = [f"{type(error).__name__}: {error}"]
        faults += [f"{folder.name}: {fault}" for fault in found]
    return faults


def read_whole(folder: Path) -> list[str]:
    """Read every part of a checkpoint; says which tensors were not there."""
    shards, nan = ShardReader(folder / "actor" / "shards"), float("nan")
    tensors = {k: torch.full(tuple(e.size), nan, dtype=e.properties.dtype) for k, e in shards.tensors.items()}
    shards.read(tensors)
    torch.load(folder / layout.DRIVER_STATE, weights_only=True)
    for path in folder.glob("actor/extra_rank_*.safetensors"):
        load_file(path)
    load_file(folder / "actor" / "huggingface" / "model.safetensors")
    return [f"{key} is not finite" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def mismatches(expected: Path, got: Path, steps: int) -> list[str]:
    """Metrics of every step and last weights in which the resumed run differs from the one that was never touched."""
    ours, theirs = metrics_by_step(expected, steps), metrics_by_step(got, steps)
    wrong = [
        f"step {step}, {key}"
        for step in ours
        for key in sorted(ours[step].keys() | theirs[step].keys())
        if theirs[step].get(key) != approx(ours[step].get(key), rel=TOLERANCE, abs=TOLERANCE)
    ]
    last = f"global_step_{steps}/actor/huggingface/model.safetensors"
    weights, resumed = load_file(expected / last), load_file(got / last)
    wrong += [] if weights.keys() == resumed.keys() else ["other tensors"]
    off = [name for name in weights.keys() & resumed.keys() if (weights[name] - resumed[name]).abs().max() > TOLERANCE]
    return wrong + [f"weights of {name}" for name in sorted(off)]


# ------------------------------------------------------------------ one run after the other


class Driver(Running):
    """A run from its start, resumed or not."""

    def end(self) -> int | None:
        """Wait for its end: its exit code, or None where it does not end."""
        with suppress(TimeoutExpired):
            return self.process.wait(PATIENCE_S)
        return None

    def last_step(self) -> int:
        """The last step that it took; 0: none yet."""
        return max((int(step) for step in re.findall(r"^step (\d+) \|", self.output, re.MULTILINE)), default=0)

    def resumed_at(self) -> int:
        """The step that it resumed from; 0: it started afresh."""
        found = re.search(r"resumed from \S+ at step (\d+)", self.output)
        return int(found[1]) if found else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.folder.glob("global_step_*.unfinished"))

    def of_kind(self, kind: str) -> list[int]:
        """Ids of its processes of one kind of ``VICTIMS``."""
        return [self.process.pid] if kind == "driver" else sorted(set().union(*map(self.processes, TITLES[kind])))


class Kill(NamedTuple):
    """What is killed, and when."""

    victim: str
    moment: str
    """``start``: before the first step; ``step``: anywhere in a step; ``save``: while a checkpoint is written."""
    after_step: int
    """The first step after which ``step`` and ``save`` may be."""


def plan_kills(count: int, steps: int, rng: random.Random) -> list[Kill]:
    """Victims in turn, in an order drawn anew for each three; of the moments after the first, four in ten are saves."""
    victims = [victim for _ in range(0, count, len(VICTIMS)) for victim in rng.sample(VICTIMS, len(VICTIMS))]
    moments = ["save", *rng.choices(["step", "save", "start"], [4, 4, 2], k=count - 1)]
    return [Kill(victims[k], moments[k], (k + 1) * steps // (count + 1)) for k in range(count)]


class Soak:
    """A run that is killed and one that is not, in one folder, and what was counted of them."""

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str], rng: random.Random) -> None:
        self._folder, self._overrides, self._env, self._rng = folder, overrides, {**QUIET, **env}, rng
        self.kills_of: Counter[str] = Counter()
        self.counts = Counter(in_save=0, resumes=0)
        self.faults: dict[str, list[str]] = {kind: [] for kind in FAULTS}
        self._waits = {"start": 0.0, "step": 0.0, "save": 0.0}

    def add_faults(self, kind: str, lines: list[str]) -> None:
        """Note faults, and show them at once."""
        self.faults[kind] += lines
        for line in lines:
            print(f"{kind}: {line}", flush=True)

    def leave_alone(self, name: str) -> Run:
        """A run, or the rest of one, from its start to its own end."""
        began = time.monotonic()
        with Driver(self._folder / name, self._overrides, self._env) as driver:
            driver.wait_until(lambda: driver.last_step() > 0)
            started_s = time.monotonic() - began
            status = driver.end()
            run = Run(driver.folder, driver.output, -1 if status is None else status)
            if run.returncode:
                raise SystemExit(f"the run in {run.folder} ended with {status}:\n{run.output[-4000:]}")
            self.add_faults("orphans", driver.outliving(AGENTS_GONE_S))
        step_s = median(run.series("timing_s/step"))
        self._waits = {"start": started_s, "step": 2 * step_s, "save": step_s}
        self.counts["resumes"] += driver.resumed_at() > 0
        return run

    def kill(self, kill: Kill) -> None:
        """Start the run, or resume it, and end it by force."""
        with Driver(self._folder / KILLED, self._overrides, self._env) as driver:
            pid = self._wait_for(kill, self._rng.uniform(0, self._waits[kill.moment]), driver)
            if pid is None:
                self.add_faults("other", [f"{kill}: the moment did not come; {driver.output[-2000:]}"])
                return
            in_save = driver.is_saving()
            with suppress(ProcessLookupError):  # it ended of itself, which the driver's end will tell
                os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            status = driver.end()
            took_s = time.monotonic() - began
            if not status:
                self.add_faults("other", [f"{kill}: the driver ended with {status} after {took_s:.1f} s"])
            print(f"{kill}, in a save: {in_save}, at step {driver.last_step()}; ended after {took_s:.1f} s", flush=True)
            self.add_faults("orphans", driver.outliving(WORKERS_GONE_S, RAY_AGENTS))
        self.kills_of[kill.victim] += 1
        self.counts.update(in_save=in_save, resumes=driver.resumed_at() > 0)
        self.add_faults("unreadable_checkpoints", unreadable(driver.folder))

    def _wait_for(self, kill: Kill, wait_s: float, driver: Driver) -> int | None:
        """The process to kill, at the moment to kill it; None: that does not come."""

        def is_due() -> bool:
            has_come = kill.moment == "start" or driver.last_step() >= kill.after_step
            return has_come and (kill.moment != "save" or driver.is_saving())

        def is_time() -> bool:
            # A machine that was busier when the waits were measured must not let the run get away.
            latest = 1 if kill.moment == "start" else kill.after_step + 1
            is_over = time.monotonic() > until or driver.last_step() >= latest
            return is_over and bool(driver.of_kind(kill.victim))

        if not driver.wait_until(is_due):
            return None
        until = time.monotonic() + wait_s
        return self._rng.choice(driver.of_kind(kill.victim) or [None]) if driver.wait_until(is_time) else None


# ------------------------------------------------------------------ the command line


def make_run(folder: Path, engine: str, steps: int, overlap: bool) -> tuple[list[str], dict[str, str]]:
    """Tiny models and prompts, and the settings of a run on them; ``overlap``: see `launch.OVERLAP`."""
    pair: Pair = make_pair(*map(Path, build_tiny_tokenizers(folder / "tokenizers")), folder / "pair")
    train = write_onerec_parquet(folder / "train.parquet", 18)
    changes = {"trainer.save_freq": 1, "trainer.max_actor_ckpt_to_keep": 3, "data.cache_dir": folder / "cache"}
    changes |= {"actor_rollout_ref.rollout.cpu_kvcache_space_gb": 0.1} | (OVERLAP if overlap else {})
    return small_run(engine, 2, steps, **changes), script_env(pair, train)


def main() -> int:
    """Run it all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--overlap", action="store_true", help="engines apart write the next batch while one trains")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one, kept on faults")
    args = parser.parse_args()
    began, rng, memory = time.monotonic(), random.Random(args.seed), {*SHARED_MEMORY.glob(f"{FOLDER_PREFIX}*")}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-run-"))
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder, *make_run(folder, args.engine, args.steps, args.overlap), rng)
    whole = soak.leave_alone(WHOLE)
    for kill in plan_kills(args.kills, args.steps, rng):
        soak.kill(kill)
    killed = folder / KILLED
    if layout.newest_whole(killed) != layout.step_folder(killed, args.steps):
        soak.leave_alone(KILLED)  # else the last kill came after the last checkpoint, and there is nothing to train
    kills = soak.kills_of.total()
    soak.add_faults("unreadable_checkpoints", unreadable(killed))
    soak.add_faults("mismatches", mismatches(whole.folder, killed, args.steps))
    soak.add_faults(
        "shared_memory_left", [str(path) for path in SHARED_MEMORY.glob(f"{FOLDER_PREFIX}*") if path not in memory]
    )
    soak.add_faults("other", [] if kills == args.kills else [f"{kills} of {args.kills} kills"])
    is_well = not any(soak.faults.values())
    if is_well and args.folder is None:
        shutil.rmtree(folder)
    report = {"kills": kills, "kills_of": soak.kills_of, **soak.counts}
    report |= {kind: len(lines) for kind, lines in soak.faults.items()}
    report |= {
        "engine": args.engine,
        "overlap": args.overlap,
        "steps": args.steps,
        "seed": args.seed,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report), flush=True)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())

"""A run through the launch script that is still going, and what is left of one that is not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from support.launch import SCRIPT, Run
from support.tiny_pairs import REPO


def processes_of(session: int) -> dict[int, str]:
    """Titles of the processes of a session of this machine, by process id; no zombies.

    A process stays in its session when its parent dies, and whatever it does to its title or environment.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if int(own_session) == session and state != "Z":
            found[int(folder.name)] = title
    return found


def metrics_by_step(folder: Path, steps: int) -> dict[int, dict[str, float]]:
    """A run's metrics, every step once, but for what the clock says, restarts, and what only a step that saves has."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    own = ("timing", "perf/", "training/restarts", "distill/teacher_canary")
    return {line["step"]: {k: v for k, v in line["data"].items() if not k.startswith(own)} for line in lines}


class Running:
    """A run in a session of its own, whose output goes to ``run.log`` in its folder; use it as a context."""

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._log = folder, folder / "run.log"
        with self._log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", str(REPO / SCRIPT), *overrides, f"trainer.default_local_dir={folder}"],
                cwd=folder,
                env={**os.environ, "ENV_DIR": sys.prefix, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left, so that a test that fails leaves nothing behind."""
        for pid in self.left():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    def left(self) -> set[int]:
        """Its processes, the driver among them."""
        return set(processes_of(self.process.pid))

    def processes(self, title: str) -> set[int]:
        """Those of its processes whose title begins so, as Ray's workers' do with their class."""
        return {pid for pid, own in processes_of(self.process.pid).items() if own.startswith(title)}

    def wait_for_steps(self, steps: int, timeout_s: float = 300) -> None:
        """Until so many steps are logged."""
        metrics, deadline = self.folder / "metrics.jsonl", time.monotonic() + timeout_s
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.02)

    def finish(self, timeout_s: float) -> Run:
        """Wait for the end of the driver, and then of all its processes."""
        returncode = self.process.wait(timeout_s)
        deadline = time.monotonic() + 15
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = processes_of(self.process.pid)
        assert not left, f"{left} outlive the run:\n{self.output[-4000:]}"
        return Run(self.folder, self.output, returncode)

"""A run through the launch script that is still going, and what is left of one that is not."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

from launch import SCRIPT, Run
from tiny_pairs import REPO

MARK = "VERL_TEST_RUN"


def processes_of(mark: str) -> set[int]:
    """Processes of this machine that have ``NAME=value`` in the environment they were started with; no zombies."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if mark.encode() in environment.split(b"\0"):
            found.add(int(folder.name))
    return found


class Running:
    """A run in a session of its own, whose output goes to ``run.log`` in its folder; use it as a context."""

    def __init__(self, folder: Path, overrides: list[str], env: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._log = folder, folder / "run.log"
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        with self._log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", str(REPO / SCRIPT), *overrides, f"trainer.default_local_dir={folder}"],
                cwd=folder,
                env={**os.environ, "ENV_DIR": sys.prefix, name: value, **env},
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
        return processes_of(self._mark)

    def processes(self, title: str) -> set[int]:
        """Those of its processes whose title begins so, as Ray's workers' do with their class."""
        titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in self.left()}
        return {pid for pid, path in titles.items() if path.exists() and path.read_text().startswith(title)}

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
        assert not self.left(), f"processes outlive the run:\n{self.output[-4000:]}"
        return Run(self.folder, self.output, returncode)

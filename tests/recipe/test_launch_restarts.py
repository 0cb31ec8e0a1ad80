"""``MAX_RESTARTS`` of the launch script, with a stand-in for Python: which exits run again, and what signals do."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.script_runner import LAUNCH, MODELS, executable, run

ENDS = """#!/usr/bin/env bash
echo "start ${RESTART_COUNT:-none} ${*: -1}"
read -ra codes <<<"$CODES"
exit "${codes[${RESTART_COUNT:-0}]}"
"""
WAITS = """#!/usr/bin/env bash
trap 'echo TERM; sleep 0.3; exit 143' TERM
trap 'echo INT; sleep 0.3; exit 130' INT
echo started
for _ in {1..200}; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("codes", "allowed", "starts", "code"),
    [
        ("0", 2, ["0 x=1"], 0),
        ("1", 2, ["0 x=1"], 1),
        ("143", 2, ["0 x=1"], 143),
        ("3", 0, ["none x=1"], 3),
        ("3 3 0", 2, ["0 x=1", "1 x=1", "2 x=1"], 0),
        ("4 3 1", 2, ["0 x=1", "1 trainer.resume_mode=auto", "2 trainer.resume_mode=auto"], 1),
        ("3 4 4", 2, ["0 x=1", "1 x=1", "2 trainer.resume_mode=auto"], 4),
    ],
)
def test_only_a_run_that_lost_a_process_runs_again(
    tmp_path: Path, codes: str, allowed: int, starts: list[str], code: int
) -> None:
    executable(tmp_path / "bin" / "python", ENDS)
    done = run(LAUNCH, "x=1", ENV_DIR=tmp_path, CODES=codes, MAX_RESTARTS=allowed, **MODELS)
    assert done.returncode == code
    assert done.stdout.splitlines() == [f"start {start}" for start in starts]
    assert done.stderr.count(f" of MAX_RESTARTS={allowed}\n") == len(starts) - 1 + (codes == "3 4 4")
    assert ("given up after restart 2 of MAX_RESTARTS=2" in done.stderr) == (codes == "3 4 4")


def test_a_number_of_restarts_is_needed() -> None:
    done = run(LAUNCH, MAX_RESTARTS="often", **MODELS)
    assert (done.returncode, "MAX_RESTARTS=often is not a number" in done.stderr) == (2, True)


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the script", "its process group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_once_and_ends_the_restarts(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    executable(tmp_path / "bin" / "python", WAITS)
    env = {**os.environ, **MODELS, "ENV_DIR": str(tmp_path), "MAX_RESTARTS": "2", "HOSTFILE": ""}
    script = subprocess.Popen(["bash", str(LAUNCH)], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert script.stdout is not None
    try:
        assert script.stdout.readline() == "started\n"
        time.sleep(0.1)
        send(script.pid, number)
        output, _ = script.communicate(timeout=10)
    finally:
        script.kill()
    assert output.splitlines() == [number.name.removeprefix("SIG")]
    assert script.returncode == 128 + number

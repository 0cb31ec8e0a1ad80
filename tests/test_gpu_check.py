"""The check of a GPU: its parts with tiny shapes on the CPU, and what it reports when one of them goes wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_pairs import REPO

from scripts.gpu_check import attention, head, ipc, ranks
from scripts.gpu_check.bench import FAILED, Bench, judge


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(True, tmp_path, tmp_path / "results")


def start(out: Path, *parts: str, path: Path = REPO) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.gpu_check", "--smoke", "--out", str(out), *parts]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, out: Path) -> tuple[str, dict[str, str]]:
    """Output, and the state of each part by the report, which is the last line."""
    output, _ = process.communicate(timeout=580)
    last = output.splitlines()[-1]
    assert (out / "gpu_check.json").read_text() == last + "\n"
    return output, {name: part["state"] for name, part in json.loads(last)["parts"].items()}


def failed(bench: Bench) -> list[str]:
    checks = [json.loads(line) for line in bench.results.read_text().splitlines()]
    assert len(checks) > 10
    return [check["check"] for check in checks if check["result"] == FAILED]


def test_a_bound_fails_a_check_and_an_estimate_does_not() -> None:
    checks = [(0.1, "<= 0.1", ""), (0.2, "<= 0.1", ""), (math.nan, "<= 0.1", ""), ([2, 9], ">= [2, 13]", "")]
    checks += [(299, ">= 300", "estimate for an H100"), (299, "", "")]
    assert [judge(*check) for check in checks] == ["ok", FAILED, FAILED, FAILED, "off", "-"]


@pytest.mark.usefixtures("one_rank")
def test_parts_pass_on_the_cpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})  # a rank writes its place there
    for part in (attention.run, head.run, ipc.run, lambda bench: ranks.run_rank(0, 1, 0, bench)):
        part(bench)
    assert not failed(bench)


def test_rows_that_see_each_other_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention.packed_sdpa_attention
    monkeypatch.setattr(attention, "packed_sdpa_attention", lambda *tensors, **_: whole(*tensors))
    attention.run(bench)
    assert len(failed(bench)) == 4 and all(name.startswith("packed_sdpa") for name in failed(bench))


def test_a_part_that_breaks_does_not_end_the_rest(tmp_path: Path) -> None:
    # Python runs this file at its start: what `ipc` imports, and `env` does not, is then missing.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['verl.weight_sync'] = None")
    process = start(tmp_path, "ipc", "ipc-expandable", "env", path=tmp_path)
    output, states = finish(process, tmp_path)
    assert states == {"ipc": "FAILED: exit code 1", "ipc-expandable": "skipped: only CUDA has it", "env": "ok"}
    assert process.returncode == 1 and "import of verl.weight_sync halted" in output


def test_a_signal_ends_the_part_and_not_the_report(tmp_path: Path) -> None:
    process = start(tmp_path, "ranks", "env")
    while not (tmp_path / "gpu_check" / "ranks.log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path)[1] == {"ranks": "interrupted", "env": "not reached"}
    assert process.returncode == 3


@pytest.mark.slow
def test_engine_and_run_pass_on_the_cpu(tmp_path: Path) -> None:
    output, states = finish(process := start(tmp_path, "engine", "run"), tmp_path)
    assert states == {"engine": "ok", "run": "ok"} and process.returncode == 0, output

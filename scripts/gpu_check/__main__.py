"""Prove the CUDA path of this machine: what was expected and what was seen, in at most ten minutes on one GPU.

    python -m scripts.gpu_check [--smoke] [--out FOLDER] [PART ...]

Parts, all by default: env, attention, head, ipc, ipc-expandable, ranks, engine, run. Each is a process of its own with
a time limit, and one that fails or crashes does not end the rest. The table grows as parts end. The last line is the
report as JSON, which FOLDER/gpu_check.json holds too; FOLDER/gpu_check/PART.log has what a part wrote.

Exit code: 0 all passed; 1 a check failed; 3 none did, but a part was skipped, interrupted or not reached.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from scripts.gpu_check.bench import FAILED, OFF, OK, Bench, Skipped

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["env", "attention", "head", "ipc", "ipc-expandable", "ranks", "engine", "run"]
SECONDS = dict(zip(PARTS, (60, 90, 90, 80, 60, 150, 240, 240), strict=True))
"""Limits of the parts."""
ALL_SECONDS, GRACE_S, POLL_S = 560, 15, 0.1
ROW = "{:<14} {:<50} {:<12} {:<24} {:<6} {}"


def run_part(name: str, bench: Bench) -> None:
    """The part itself, in its own process."""
    import torch

    try:
        if name == "ipc-expandable" and bench.smoke:
            raise Skipped("only CUDA has it")
        if name != "env" and not bench.smoke and not torch.cuda.is_available():
            raise Skipped("torch sees no GPU")
        importlib.import_module(f"scripts.gpu_check.{name.split('-')[0]}").run(bench)
    except Skipped as reason:
        bench.check("skipped", str(reason))


def end_session(session: int) -> None:
    """End all processes that a part has left; SIGTERM first, for a run ends its Ray itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    process.send_signal(number)
                    left.append(process)
        psutil.wait_procs(left, timeout=GRACE_S)


def start_part(name: str, seconds: float, args: argparse.Namespace, work: str, stop: list[int]) -> dict[str, Any]:
    """Run a part to its end, its limit or until ``stop`` is no longer empty; its state, seconds and checks."""
    results, log = (args.out / "gpu_check" / f"{name}.{kind}" for kind in ("jsonl", "log"))
    results.write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if name.startswith("ipc"):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{name == 'ipc-expandable'}"
    command = [sys.executable, "-m", "scripts.gpu_check", name, f"--of-part={results.absolute()}", f"--work={work}"]
    command, began = command + ["--smoke"] * args.smoke, time.monotonic()
    place = {"cwd": ROOT, "env": environment, "start_new_session": True}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, **place) as process:
        while (code := process.poll()) is None and not stop and time.monotonic() - began < seconds:
            time.sleep(POLL_S)
        took = time.monotonic() - began
        end_session(process.pid)
    state = f"{FAILED}: exit code {code}" if code else OK
    if code is None:
        is_cut = stop or seconds < SECONDS[name]  # by a signal, or by the end of all parts' time
        state = "interrupted" if is_cut else f"{FAILED}: not done in {seconds:.0f} s"
    lines = results.read_text().splitlines()
    checks = [json.loads(line, parse_float=lambda text: float(f"{float(text):.4g}")) for line in lines]
    if state == OK and any(check["result"] == FAILED for check in checks):
        state = FAILED
    if checks and checks[-1]["check"] == "skipped":
        state = f"skipped: {checks.pop()['seen']}"
    return {"state": state, "seconds": round(took, 1), "checks": checks}


def show(name: str, part: dict[str, Any], log: Path) -> None:
    """The part's lines of the table, and the end of its output where it broke."""
    for check in part["checks"]:
        columns = (check[key] for key in ("check", "expected", "seen", "result", "source"))
        print(ROW.format(name, *(value if isinstance(value, str) else json.dumps(value) for value in columns)).rstrip())
    print(f"{name:<14} {part['state']}, {part['seconds']} s", flush=True)
    if part["state"].startswith(FAILED):
        print(*log.read_text(errors="replace").splitlines()[-12:], sep="\n")


def main() -> int:
    """Run the parts one after the other; the exit code."""
    how = {"prog": "python -m scripts.gpu_check", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **how)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--smoke", action="store_true", help="the same code with tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", help="where the report goes (outputs)")
    parser.add_argument("--of-part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.of_part:
        run_part(args.parts[0], Bench(args.smoke, args.work, args.of_part))
        return 0
    (args.out / "gpu_check").mkdir(parents=True, exist_ok=True)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    slower = 4 if args.smoke else 1  # the CPUs may be shared
    deadline = time.monotonic() + slower * ALL_SECONDS
    parts = {name: {"state": "not reached", "seconds": 0.0, "checks": []} for name in args.parts or PARTS}
    print(ROW.format("part", "check", "expected", "seen", "", "where the bound comes from"))
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
        for name, part in parts.items():
            seconds = min(slower * SECONDS[name], deadline - time.monotonic())
            if seconds > 0 and not stop:
                part |= start_part(name, seconds, args, work, stop)
                show(name, part, args.out / "gpu_check" / f"{name}.log")
    print(*(f"{name}: {part['state']}" for name, part in parts.items()), sep="\n")
    for part in parts.values():
        part["outside"] = {c["check"]: c["result"] for c in part["checks"] if c["result"] in (FAILED, OFF)}
        part["checks"] = {check["check"]: check["seen"] for check in part["checks"]}
    states = {part["state"] for part in parts.values()}
    code = 1 if any(state.startswith(FAILED) for state in states) else 0 if states == {OK} else 3
    report = json.dumps({"exit_code": code, "smoke": args.smoke, "parts": parts})
    (args.out / "gpu_check.json").write_text(report + "\n")
    print(report)
    return code


if __name__ == "__main__":
    sys.exit(main())

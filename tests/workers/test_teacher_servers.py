"""Servers that a run starts, with a program in vLLM's place that answers and has a process of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.launch import processes_of
from support.tiny_pairs import REPO

from verl.config import RolloutConfig
from verl.workers.teacher_servers import VLLMServer

PROGRAM = """
import http.server, os, subprocess, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = arguments["--model"]
if model == "unknown option":
    print("api_server.py: error: unrecognized arguments: --nope", file=sys.stderr)
    sys.exit(2)
if model == "too large":
    print("(Worker pid=1) ERROR 11-30 06:23:06 [core.py:1] ValueError: no memory for the weights", flush=True)
    raise RuntimeError("see root cause above")
subprocess.Popen(["sleep", "600.25"])
assert os.environ["VLLM_API_KEY"] == "secret-of-mine" and "secret" not in " ".join(sys.argv)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""
ALONE = """
import asyncio, sys, time
from verl.config import RolloutConfig
from verl.workers.teacher_servers import VLLMServer
server = VLLMServer("127.0.0.1", {"model": "any"}, RolloutConfig(), "cpu", "secret-of-mine")
print(asyncio.run(server.launch()), flush=True)
time.sleep(600)
"""


@pytest.fixture
def instead_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "api_server.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPO}")


def server_of(model: str) -> VLLMServer:
    return VLLMServer("127.0.0.1", {"model": model}, RolloutConfig(), "cpu", "secret-of-mine")


def wait_for_none(session: int, group: bool = False) -> None:
    until = time.monotonic() + 20
    while left := processes_of(session, group):
        assert time.monotonic() < until, left
        time.sleep(0.05)


@pytest.mark.usefixtures("instead_of_vllm")
@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_a_server_answers_and_leaves_no_process(end: str) -> None:
    """It is asked to end, or killed: what it started ends too."""
    server = server_of("any")
    url = asyncio.run(server.launch())
    urllib.request.urlopen(f"{url}/health", timeout=10).close()
    process: Any = server._process
    titles = processes_of(process.pid, group=True).values()
    assert sum("600.25" in title for title in titles) == 1 and len(titles) == 3, "server, its process, the one beside"
    if end == "kill":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    else:
        asyncio.run(server.shutdown())
    wait_for_none(process.pid, group=True)
    asyncio.run(server.shutdown())


@pytest.mark.usefixtures("instead_of_vllm")
def test_a_server_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ALONE], stdout=subprocess.PIPE, text=True, cwd=REPO, start_new_session=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith("http://127.0.0.1:")
        assert len(processes_of(owner.pid)) == 4
        owner.kill()
        owner.wait()
        wait_for_none(owner.pid)


@pytest.mark.usefixtures("instead_of_vllm")
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ValueError, match=r"server of unknown option ended: .*unrecognized arguments: --nope"):
        asyncio.run(server_of("unknown option").launch())
    with pytest.raises(RuntimeError, match="server of too large ended: ValueError: no memory for the weights"):
        asyncio.run(server_of("too large").launch())

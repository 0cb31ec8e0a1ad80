"""What others on the machine and on its network can see of a run: no secret, and no open port."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support.launch import Running, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

pytestmark = pytest.mark.slow

STEPS = 2


@dataclass
class Seen:
    """What was seen of a run from outside."""

    folders: list[Path]
    """Of the run and of Ray."""
    planted: dict[str, str]
    """Secrets by the variable that holds them."""
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Titles of processes, and addresses that they listen at."""
    command_lines: set[str] = field(default_factory=set)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    """By title of the process."""

    def look_at(self, process: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            self.command_lines.add(" ".join(line))
            title = line[0] if line else ""
            with suppress(psutil.AccessDenied):
                self.environments[title] = process.environ()
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.type == 2 and not connection.raddr):
                    self.listening.add((title, connection.laddr.ip))


@pytest.fixture(scope="module")
def seen(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A run with planted secrets, looked at while it trains; vLLM has processes and sockets of its own."""
    folder = tmp_path_factory.mktemp("private")
    ray_folder = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))  # Ray's sockets want short paths
    planted = {name: secrets.token_hex(20) for name in ("WANDB_API_KEY", "HF_TOKEN", "SOME_SERVICE_TOKEN")}
    passed = "ray_kwargs.ray_init.runtime_env.env_vars.SOME_SERVICE_TOKEN=${oc.env:SOME_SERVICE_TOKEN}"
    changes = {"trainer.logger": "[console,file,wandb,tensorboard]", "trainer.rollout_data_dir": folder / "rollouts"}
    train = write_onerec_parquet(folder / "train.parquet", 18)
    env = {**script_env(tiny_pair, train), **planted, "RAY_TMPDIR": str(ray_folder)}
    found = Seen([folder, ray_folder], planted)
    overrides = [*small_run("vllm", 2, STEPS, **changes), passed]
    with Running(folder / "run", overrides, env) as run:
        driver = psutil.Process(run.process.pid)
        while run.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for process in [driver, *driver.children(recursive=True)]:
                    found.look_at(process)
            time.sleep(0.2)
    assert run.process.returncode == 0, run.output[-6000:]
    yield found
    shutil.rmtree(ray_folder)


def test_nothing_listens_beyond_the_loopback(seen: Seen) -> None:
    titles = " ".join(title for title, _ in seen.listening)
    for part in ("gcs_server", "raylet", "ray::WorkerHost", "Replica", "ray::AgentLoopWorker"):
        assert part in titles, f"{part} was not seen: the test sees too little"
    open_to_others = {(title, ip) for title, ip in seen.listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert not open_to_others


def test_secrets_are_in_no_file_and_no_list_of_processes(seen: Seen, tmp_path: Path) -> None:
    workers = [env for title, env in seen.environments.items() if title.startswith("ray::") and env]
    assert any(env.get("SOME_SERVICE_TOKEN") == seen.planted["SOME_SERVICE_TOKEN"] for env in workers), "it got there"
    token = next(env["RAY_AUTH_TOKEN"] for env in workers if "RAY_AUTH_TOKEN" in env)
    values = {**seen.planted, "RAY_AUTH_TOKEN": token}
    files = [path for root in seen.folders for path in root.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    expected = {"run.log", "config.yaml", "metrics.jsonl", "manifest.json", "model.safetensors", "raylet.out"}
    assert expected <= names and any(name.endswith(".wandb") for name in names), "the test searches too little"
    (tmp_path / "planted").write_bytes(b"\0" + token.encode())
    assert holders([tmp_path / "planted"], values) == ["RAY_AUTH_TOKEN in planted"], "the search finds what is there"
    assert not holders(files, values)
    assert not [name for name, value in values.items() for line in seen.command_lines if value in line]


def holders(files: list[Path], values: dict[str, str]) -> list[str]:
    """Which value is in which file."""
    return [f"{key} in {path.name}" for path in files for key in values if values[key].encode() in path.read_bytes()]

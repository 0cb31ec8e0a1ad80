"""Ray as a run on one machine starts it: where it listens, and whom it serves."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOST = """
import sys
from verl.utils.loopback import keep_to_loopback
keep_to_loopback()
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
import os
print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
sys.stdin.readline()
"""
GUEST = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 5))
"""


@pytest.fixture(scope="module")
def host(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and token of a Ray that a process of ours started."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-c", HOST],
        cwd=repo,
        env={**env, "HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address, token = process.stdout.readline().split()
        yield address, token
    finally:
        process.communicate("\n", timeout=60)
    assert not (home / ".ray").exists(), "no file holds the token"


def ask(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask Ray's head for something, as another process of this machine."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    return subprocess.run([sys.executable, "-c", GUEST, address], env=env, capture_output=True, text=True, timeout=120)


def test_ray_is_on_the_loopback_and_serves_who_has_the_token(host: tuple[str, str]) -> None:
    address, token = host
    assert address.startswith("127.0.0.1:")
    served = ask(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert served.returncode == 0 and b"[" in served.stdout.encode(), served.stderr[-2000:]


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}],
    ids=["another token", "no token"],
)
def test_nobody_is_served_without_it(host: tuple[str, str], environment: dict[str, str]) -> None:
    refused = ask(host[0], **environment)
    assert refused.returncode != 0
    assert "nauthenticated" in refused.stderr or "uthentication" in refused.stderr, refused.stderr[-2000:]

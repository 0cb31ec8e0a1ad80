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


WITHOUT_RAY = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture(scope="module")
def host(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and token of a Ray that a process of ours started."""
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", HOST],
        cwd=repo,
        env=WITHOUT_RAY | {"HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            address, token = process.stdout.readline().split()
            yield address, token
        finally:
            process.communicate("\n", timeout=60)
    assert not (home / ".ray").exists(), "no file holds the token"


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_ray_is_on_the_loopback_and_serves_who_has_the_token(host: tuple[str, str], mode: str) -> None:
    address, token = host
    assert address.startswith("127.0.0.1:")
    env = WITHOUT_RAY | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
    guest = subprocess.run([sys.executable, "-c", GUEST, address], env=env, capture_output=True, text=True, timeout=120)
    if mode == "token":
        assert guest.returncode == 0 and "[" in guest.stdout, guest.stderr[-2000:]
    else:
        assert guest.returncode != 0
        assert "nauthenticated" in guest.stderr or "uthentication" in guest.stderr, guest.stderr[-2000:]

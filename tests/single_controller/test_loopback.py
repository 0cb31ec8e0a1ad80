"""Ray as a run on one machine starts it: where it listens, and whom it serves."""

import os
import subprocess
import sys
from pathlib import Path

from support.tiny_pairs import REPO

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


def test_ray_is_on_the_loopback_and_serves_who_has_the_token(tmp_path: Path) -> None:
    command, home = [sys.executable, "-c", HOST], {"HOME": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPO, env=WITHOUT_RAY | home, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            address, token = process.stdout.readline().split()
            assert address.startswith("127.0.0.1:")
            for mode in ("token", "disabled"):
                env = WITHOUT_RAY | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
                command = [sys.executable, "-c", GUEST, address]
                guest = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
                assert (guest.returncode == 0) == (mode == "token"), guest.stderr[-2000:]
            assert "uthenticat" in guest.stderr, guest.stderr[-2000:]
        finally:
            process.communicate("\n", timeout=60)
    assert not (tmp_path / ".ray").exists(), "no file holds the token"

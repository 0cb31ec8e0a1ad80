"""Deploy, start, train and stop on three hosts with addresses and sshds of their own, and the errors where that fails.

The hosts are namespaces of this machine (network_hosts.py). Scripts run on the first of them, as a user would run them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.launch import (
    OVERLAP,
    SCRIPT,
    launch,
    metrics_by_step,
    read_metrics,
    script_env,
    small_run,
    write_onerec_parquet,
)
from support.network_hosts import Host, Network, require_tools
from support.script_runner import executable
from support.tiny_pairs import REPO, Pair

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# An environment that the hosts share.
PYTHON = '#!/usr/bin/env bash\nexec REAL_PYTHON "$@"\n'
RAY = '#!/usr/bin/env bash\nexec REAL_PYTHON -c "from ray.scripts.scripts import main; main()" "$@"\n'


@dataclass
class Cluster:
    """The hosts, and the scripts run on the first."""

    network: Network
    hosts: list[Host]
    environment: Path
    hostfile: Path
    cluster_dir: Path

    def command(self, script: str, *arguments: str | Path) -> list[str]:
        return [*self.hosts[0].inside(), "bash", str(REPO / script), *map(str, arguments)]

    def env(self, **more: str) -> dict[str, str]:
        own = {"ENV_DIR": self.environment, "LOG_DIR": self.network.folder / "logs", "CLUSTER_DIR": self.cluster_dir}
        own |= {
            "SSH_OPTS": self.network.ssh_opts,
            "CONNECT_S": 3,
            "RAY_PORT": 6401,
            "NUM_CPUS": 2,
            "OMP_NUM_THREADS": 1,
        }
        return {**os.environ, **{name: str(value) for name, value in own.items()}, **more}

    def run(self, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, with both outputs in one."""
        outputs: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.run(self.command(script, *arguments), env=self.env(), text=True, timeout=300, **outputs)

    def train(
        self, folder: Path, hostfile: Path, overrides: list[str], env: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Begin a run in ``folder/run``, whose output goes to ``folder/output``."""
        with (folder / "output").open("w") as output:
            outputs: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
            own = self.env(**env, OUTPUT_DIR=str(folder / "run"))
            return subprocess.Popen(self.command(SCRIPT, hostfile, *overrides), env=own, cwd=folder, **outputs)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("init_ray_cluster.sh", *arguments, self.hostfile)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_tools()
    network = Network(tmp_path_factory.mktemp("cluster") / "three hosts", 3)
    # Sockets lie below it, so it has to have a short name.
    cluster_dir = Path(f"/tmp/kvt{os.getpid()}")
    environment = network.folder / "my env"
    for name, text in (("python", PYTHON), ("ray", RAY)):
        executable(environment / "bin" / name, text.replace("REAL_PYTHON", sys.executable))
    try:
        network.start()
        first, second, third = network.hosts
        hostfile = network.folder / "host file"
        hostfile.write_text(f"# three\n{first.address}\n\nroot@{second.name}:22 slots=1 # by name\n{third.name}\n")
        yield Cluster(network, network.hosts, environment, hostfile, cluster_dir)
    finally:
        network.end()
        shutil.rmtree(cluster_dir, ignore_errors=True)


def test_copying_brings_the_tree_and_leaves_what_is_only_there(cluster: Cluster) -> None:
    deploy, alone = ("deploy_env.sh", "--all-nodes", "--device", "cpu"), cluster.network.folder / "second host"
    alone.write_text("root@kvhost2:22\n")
    # On the second host the checkout is an empty folder of its own, with a user's file in it.
    own = cluster.network.folder / "own checkout"
    (own / "verl").mkdir(parents=True)
    (own / "mine.txt").write_text("kept")
    (own / ".ci").mkdir()
    (own / ".ci" / "mine").write_text("kept in a folder that both have")
    (own / "verl" / "stale.py").write_text("")
    second, environment = cluster.hosts[1].inside(), Path(sys.prefix)
    if environment.is_relative_to(REPO):  # it stays in sight
        (own / environment.relative_to(REPO)).mkdir(parents=True)
        subprocess.run([*second, "mount", "--bind", environment, own / environment.relative_to(REPO)], check=True)
    subprocess.run([*second, "mount", "--rbind", own, REPO], check=True)
    try:
        done = cluster.run(*deploy, alone)
        assert "kvhost2:22: failed" in done.stdout, "the folder is there and the script is not"
        done = cluster.run(*deploy, "--copy", alone)
    finally:
        subprocess.run([*second, "umount", "--recursive", REPO], check=True)
    assert done.returncode == 0, done.stdout
    assert (own / "mine.txt").read_text() == "kept" and (own / ".ci" / "mine").is_file()
    assert (own / "verl" / "protocol.py").is_file() and not (own / "verl" / "stale.py").exists()
    assert not (own / ".git").exists()


@pytest.fixture(scope="module")
def running(cluster: Cluster) -> Iterator[str]:
    """Ray on all three; gives the output."""
    done = cluster.ray()
    try:
        assert done.returncode == 0, done.stdout
        yield done.stdout
    finally:
        stopped = cluster.ray("--stop")
    assert stopped.returncode == 0, stopped.stdout
    left = {host.name: host.processes() for host in cluster.hosts}
    assert not any(left.values()), left


def test_all_nodes_register_with_what_they_have(running: str) -> None:
    assert "have 3 of 3 nodes, 6 of 6 CPUs" in running
    for number in (1, 2, 3):
        assert f"node 10.213.77.{number} 2 0" in running


def test_a_second_start_does_nothing(cluster: Cluster, running: str) -> None:
    before = [set(host.processes()) for host in cluster.hosts]
    done = cluster.ray()
    assert done.returncode == 0, done.stdout
    assert "running already" in done.stdout and "nothing to do" in done.stdout
    assert all(old & set(host.processes()) for old, host in zip(before, cluster.hosts, strict=True))
    status = cluster.ray("--status")
    assert status.stdout.count("running") == 3, status.stdout


def test_the_token_shows_nowhere_and_the_dashboard_is_local(cluster: Cluster, running: str) -> None:
    (token,) = {path.read_text() for path in cluster.cluster_dir.glob("*/token")}
    assert len(token) == 64
    titles = [title for host in cluster.hosts for title in host.processes().values()]
    assert not [title for title in titles if token in title]
    logs = [*(cluster.network.folder / "logs").iterdir(), *cluster.cluster_dir.glob("*/ray.log")]
    assert not [log for log in logs if token in log.read_text(errors="replace")]
    listening = subprocess.run(
        [*cluster.hosts[0].inside(), "ss", "-Hltn", "sport = :8265"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[3] for line in listening.splitlines()} == {"127.0.0.1:8265"}


def test_a_lost_node_is_found_and_started_again(cluster: Cluster, running: str) -> None:
    third = cluster.hosts[2]
    (folder,) = [path.parent for path in cluster.cluster_dir.glob("*/facts") if third.address in path.read_text()]
    leader = int((folder / "node").read_text().split()[0])
    os.kill(leader, 9)  # the others of the session stay, as after a crash
    deadline = time.monotonic() + 30
    while any("ray start" in title for title in third.processes().values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    done = cluster.ray()
    assert done.returncode == 0, done.stdout
    assert "joining" in done.stdout and "have 3 of 3 nodes" in done.stdout


def number_on(host: Host, title: str = "ray::WorkerHost") -> int:
    """Processes with such a title that live there; by default training ranks."""
    return sum(own.startswith(title) for own in host.processes().values())


def test_engines_on_one_host_and_ranks_on_two_train_as_all_of_them_on_one_machine(
    cluster: Cluster, running: str, tiny_pair: Pair, tmp_path: Path
) -> None:
    folder, steps = tmp_path / "a run", 4
    folder.mkdir()
    env = script_env(tiny_pair, write_onerec_parquet(folder / "train.parquet", 8 * steps)) | {"OMP_NUM_THREADS": "1"}
    changes = {**OVERLAP, "trainer.save_freq": -1}
    on_two = small_run("hf", 1, steps, **changes, **{"trainer.nnodes": 2})
    process = cluster.train(folder, cluster.hostfile, on_two, env)
    try:
        found = set[tuple[int, int]]()
        while process.poll() is None:
            counts = [(number_on(host), number_on(host, "ray::HFReplica")) for host in cluster.hosts]
            found.update(counts if sum(map(sum, counts)) == 3 else [])
            time.sleep(0.2)
    finally:
        process.kill()
    assert process.wait() == 0, (folder / "output").read_text()[-6000:]
    assert found == {(1, 0), (0, 1)}, "ranks and engines of each host"
    alone = launch(tmp_path / "alone", small_run("hf", 2, steps, **changes), env)
    expected, got = metrics_by_step(alone.folder, steps), metrics_by_step(folder / "run", steps)
    assert {"actor/grad_norm", "actor/pg_loss", "distill/reverse_kl"} <= expected[steps].keys()
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=1e-5, abs=1e-5), f"step {step}"


def test_a_run_on_two_hosts_trains_until_one_is_cut_off_in_the_middle_of_a_step(
    cluster: Cluster, running: str, tiny_pair: Pair, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    hostfile = folder / "two hosts"
    hostfile.write_text(f"{cluster.hosts[0].address}\nkvhost2\n")
    env = script_env(tiny_pair, write_onerec_parquet(folder / "train.parquet", 800))
    process = cluster.train(folder, hostfile, small_run("vllm", 1, 100, **{"trainer.save_freq": 1}), env)
    deadline = time.monotonic() + 600
    try:
        while "step 3 |" not in (folder / "output").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()[-6000:]
            time.sleep(0.2)
        ranks = [number_on(host) for host in cluster.hosts]
        assert sorted(ranks) == [0, 1, 1], "one rank each on two of the three"
        away = cluster.hosts[ranks.index(1, 1)]
        began = time.monotonic()
        cluster.network.unplug(away)
        try:
            process.wait(timeout=180)
        finally:
            cluster.network.plug(away)
        took_s = time.monotonic() - began
    finally:
        process.kill()
        process.wait()
    text = (folder / "output").read_text()
    assert took_s < 60, f"{took_s:.0f} s: {text[-4000:]}"
    assert process.returncode != 0
    assert away.address in text[text.index("error: ") :], text[-4000:]
    last = int((folder / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert last >= 2 and {1, 2, 3} <= read_metrics(folder / "run").keys()
    assert (folder / "run" / f"global_step_{last}" / "actor").is_dir()

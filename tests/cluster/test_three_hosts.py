"""Deploy, start, train and stop on three hosts with addresses and sshds of their own, and the errors where that fails.

The hosts are namespaces of this machine (network_hosts.py). Scripts run on the first of them, as a user would run them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.launch import SCRIPT, read_metrics, script_env, small_run, write_onerec_parquet
from support.network_hosts import Host, Network, require_tools
from support.tiny_pairs import REPO, Pair

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PORT = 6401
# An environment that the hosts share. Where the file old_torch names a host, that host reports another torch; what a
# host could import once (the check of deploy_env.sh takes a while) it is not made to import again.
PYTHON = """\
#!/usr/bin/env bash
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ "$*" == *versions.py* && "$(cat "$here/old_torch" 2>/dev/null)" == "$(uname -n)" ]]; then
    echo "versions python=3.11.0 torch=1.0.0"
    exit 0
fi
if [[ "$1" == - && -e "$here/imported-$(uname -n)" ]]; then
    exit 0
fi
status=0
[[ "$1" == - ]] || exec REAL_PYTHON "$@"
REAL_PYTHON - || status=$?
((status)) || touch "$here/imported-$(uname -n)"
exit "$status"
"""
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
        own = {
            "ENV_DIR": str(self.environment),
            "SSH_OPTS": self.network.ssh_opts,
            "CONNECT_S": "3",
            "LOG_DIR": str(self.network.folder / "logs"),
            "CLUSTER_DIR": str(self.cluster_dir),
            "RAY_PORT": str(PORT),
            "NUM_CPUS": "2",
            "OMP_NUM_THREADS": "1",
        }
        return {**os.environ, **own, **more}

    def run(self, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, with both outputs in one."""
        outputs: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.run(self.command(script, *arguments), env=self.env(), text=True, timeout=300, **outputs)

    def ray(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("init_ray_cluster.sh", *arguments)

    def deploy(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("deploy_env.sh", "--all-nodes", *arguments, "--device", "cpu", self.hostfile)

    def write_hosts(self, name: str, *lines: str) -> Path:
        path = self.network.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_tools()
    network = Network(tmp_path_factory.mktemp("cluster") / "three hosts", 3)
    # Sockets lie below it, so it has to have a short name.
    cluster_dir = Path(f"/tmp/kvt{os.getpid()}")
    environment = network.folder / "my env"
    (environment / "bin").mkdir(parents=True)
    for name, text in (("python", PYTHON), ("ray", RAY)):
        (environment / "bin" / name).write_text(text.replace("REAL_PYTHON", sys.executable))
        (environment / "bin" / name).chmod(0o755)
    try:
        network.start()
        first, second, third = network.hosts
        hostfile = network.folder / "host file"
        hostfile.write_text(f"# three\n{first.address}\n\nroot@{second.name}:22 slots=1 # by name\n{third.name}\n")
        yield Cluster(network, network.hosts, environment, hostfile, cluster_dir)
    finally:
        network.end()
        shutil.rmtree(cluster_dir, ignore_errors=True)


@contextmanager
def own_checkout(host: Host, folder: Path) -> Iterator[None]:
    """Have ``folder`` stand in the checkout's place on this host; an environment inside the checkout stays in sight."""
    environment = Path(sys.prefix)
    inside = folder / environment.relative_to(REPO) if environment.is_relative_to(REPO) else None
    if inside:
        inside.mkdir(parents=True)
        subprocess.run([*host.inside(), "mount", "--bind", environment, inside], check=True)
    subprocess.run([*host.inside(), "mount", "--rbind", folder, REPO], check=True)
    try:
        yield
    finally:
        subprocess.run([*host.inside(), "umount", "--recursive", REPO], check=True)
        if inside:
            subprocess.run([*host.inside(), "umount", inside], check=True)


def rows(output: str) -> dict[str, str]:
    """Result by host, from the table of a deployment."""
    lines = output[output.index("host    ") :].splitlines()[1:4]
    return {line.split()[0]: line.split()[1] for line in lines}


def test_deployment_checks_every_host(cluster: Cluster) -> None:
    done = cluster.deploy()
    assert done.returncode == 0, done.stdout
    assert rows(done.stdout) == {cluster.hosts[0].address: "ok", "kvhost2:22": "ok", "kvhost3": "ok"}


def test_copying_brings_the_tree_and_leaves_what_is_only_there(cluster: Cluster) -> None:
    # On the second host the checkout is an empty folder of its own, with a user's file in it.
    own = cluster.network.folder / "own checkout"
    own.mkdir()
    (own / "mine.txt").write_text("kept")
    (own / "verl").mkdir()
    (own / "verl" / "stale.py").write_text("")
    second = cluster.hosts[1]
    with own_checkout(second, own):
        done = cluster.deploy()
        assert done.returncode == 1
        assert "kvhost2:22: failed" in done.stdout, "the folder is there and the script is not"
        done = cluster.deploy("--copy")
        assert done.returncode == 0, done.stdout
        assert (own / "mine.txt").read_text() == "kept"
        assert (own / "verl" / "protocol.py").is_file() and not (own / "verl" / "stale.py").exists()
        assert not (own / ".git").exists()


def test_deployment_names_hosts_that_are_away_or_refuse_the_key(cluster: Cluster) -> None:
    second, third = cluster.hosts[1:]
    keys = second.folder / "authorized_keys"
    allowed = keys.read_text()

    cluster.network.unplug(third)
    keys.write_text("")
    try:
        done = cluster.deploy()
    finally:
        keys.write_text(allowed)
        cluster.network.plug(third)
    assert done.returncode == 1
    assert rows(done.stdout) == {cluster.hosts[0].address: "ok", "kvhost2:22": "failed", "kvhost3": "failed"}
    assert "kvhost2:22: failed: its ssh refuses this user or key" in done.stdout
    assert "kvhost3: failed: ssh cannot reach it" in done.stdout
    assert "Permission denied (publickey)" in done.stdout and "connect to host kvhost3" in done.stdout


def test_another_package_version_on_one_host_is_an_error(cluster: Cluster) -> None:
    mark = cluster.environment / "bin" / "old_torch"
    mark.write_text("kvhost3")
    try:
        deployed, started = cluster.deploy(), cluster.ray(cluster.hostfile)
    finally:
        mark.unlink()
    for done in (deployed, started):
        assert done.returncode == 1
        assert "torch differs between hosts" in done.stdout and "1.0.0 on kvhost3" in done.stdout
    assert "nothing was started" in started.stdout
    assert not any(host.processes() for host in cluster.hosts)


def test_a_port_in_use_is_named(cluster: Cluster) -> None:
    taken = "import socket, time; s = socket.create_server(('', PORT)); time.sleep(300)".replace("PORT", str(PORT))
    other = subprocess.Popen([*cluster.hosts[0].inside(), sys.executable, "-c", taken])
    try:
        time.sleep(1)
        done = cluster.ray(cluster.hostfile)
    finally:
        other.kill()
        other.wait()
    assert done.returncode == 1
    assert f"port {PORT} is in use by another program" in done.stdout
    assert f"{cluster.hosts[0].address}: the head did not start" in done.stdout
    assert not any(host.processes() for host in cluster.hosts)


@pytest.fixture(scope="module")
def running(cluster: Cluster) -> Iterator[str]:
    """Ray on all three; gives the output."""
    done = cluster.ray(cluster.hostfile)
    try:
        assert done.returncode == 0, done.stdout
        yield done.stdout
    finally:
        stopped = cluster.ray("--stop", cluster.hostfile)
    assert stopped.returncode == 0, stopped.stdout
    left = {host.name: host.processes() for host in cluster.hosts}
    assert not any(left.values()), left


def test_all_nodes_register_with_what_they_have(running: str) -> None:
    assert "have 3 of 3 nodes, 6 of 6 CPUs" in running
    for number in (1, 2, 3):
        assert f"node 10.213.77.{number} 2 0" in running


def test_a_second_start_does_nothing(cluster: Cluster, running: str) -> None:
    before = [set(host.processes()) for host in cluster.hosts]
    done = cluster.ray(cluster.hostfile)
    assert done.returncode == 0, done.stdout
    assert "running already" in done.stdout and "nothing to do" in done.stdout
    assert all(old & set(host.processes()) for old, host in zip(before, cluster.hosts, strict=True))
    status = cluster.ray("--status", cluster.hostfile)
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
    done = cluster.ray(cluster.hostfile)
    assert done.returncode == 0, done.stdout
    assert "joining" in done.stdout and "have 3 of 3 nodes" in done.stdout


@contextmanager
def training(cluster: Cluster, pair: Pair, folder: Path, engine: str, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run of two ranks on the first two hosts, whose output goes to ``folder/output``; ended with the block."""
    folder.mkdir()
    hostfile = cluster.write_hosts("two hosts", cluster.hosts[0].address, "kvhost2")
    settings = small_run(engine, 1, steps, **{"trainer.save_freq": 1})
    train = write_onerec_parquet(folder / "train.parquet", 800)
    env = cluster.env(**script_env(pair, train), OUTPUT_DIR=str(folder / "run"))
    command = cluster.command(SCRIPT, hostfile, *settings)
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ranks_on(host: Host) -> int:
    """Training ranks that live there."""
    return sum(title.startswith("ray::WorkerHost") for title in host.processes().values())


def test_three_steps_on_two_hosts(cluster: Cluster, running: str, tiny_pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    most_ranks = [0, 0, 0]
    deadline = time.monotonic() + 600
    with training(cluster, tiny_pair, folder, "vllm", 3) as process:
        while process.poll() is None and time.monotonic() < deadline:
            most_ranks = [max(most, ranks_on(host)) for most, host in zip(most_ranks, cluster.hosts, strict=True)]
            time.sleep(0.5)
    output = (folder / "output").read_text()
    assert process.returncode == 0, output[-6000:]
    assert sorted(read_metrics(folder / "run")) == [1, 2, 3]
    assert sorted(most_ranks) == [0, 1, 1], "one rank each on two of the three"


def test_a_host_cut_off_in_the_middle_of_a_step_ends_the_run(
    cluster: Cluster, running: str, tiny_pair: Pair, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    with training(cluster, tiny_pair, folder, "hf", 100) as process:
        deadline = time.monotonic() + 600
        while "step 3 |" not in (folder / "output").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()[-6000:]
            time.sleep(0.2)
        away = [host for host in cluster.hosts if ranks_on(host)][-1]
        began = time.monotonic()
        cluster.network.unplug(away)
        try:
            process.wait(timeout=180)
        finally:
            cluster.network.plug(away)
        took_s = time.monotonic() - began
    output = (folder / "output").read_text()
    assert took_s < 60, f"{took_s:.0f} s: {output[-4000:]}"
    assert process.returncode != 0
    assert away.address in output[output.index("error: ") :], output[-4000:]
    last = int((folder / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert last >= 2
    assert (folder / "run" / f"global_step_{last}" / "actor").is_dir()

"""The scripts for several hosts, with a stand-in for ssh that runs its command on this machine."""

import os
import subprocess
from pathlib import Path

import pytest
from support.script_runner import CLUSTER, DEPLOY, LAUNCH, MODELS, RAY_NODE, executable, read_back, run, stand_in
from support.tiny_pairs import REPO

from verl.trainer.launch.typed import load_config
from verl.utils.redaction import looks_secret


def parse(hostfile):
    """Hosts of a hostfile as ``name|target|port|slots``, the messages and the exit code."""
    show = 'for i in "${!HOSTS[@]}"; do echo "${HOSTS[i]}|${HOST_TARGETS[i]}|${HOST_PORTS[i]}|${HOST_SLOTS[i]}"; done'
    source = f'SCRIPT=test ROOT="{REPO}" PASSED=(); source "{REPO}/scripts/hosts.sh"'
    command = ["bash", "-c", f'set -euo pipefail; {source}; read_hosts "$1"; {show}', "-", str(hostfile)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr, done.returncode


def test_every_way_to_write_a_host(hostfile):
    lines = {
        "# a comment\n": None,
        "node-a": "node-a|node-a||",
        "  node-b.example.org slots=8  # eight GPUs\r": "node-b.example.org|node-b.example.org||8",
        "\tme@node-c:2222 slots=4": "node-c:2222|me@node-c|2222|4",
        "198.51.100.7:22": "198.51.100.7:22|198.51.100.7|22|",
        "[2001:db8::9]": "[2001:db8::9]|2001:db8::9||",
        "root@[2001:db8::a]:2200 slots=2": "[2001:db8::a]:2200|root@2001:db8::a|2200|2",
        "node-d slots=4 max_slots=8": "node-d|node-d||4",
        "node-e max-slots=8": "node-e|node-e||",
    }
    assert parse(hostfile(*lines))[:2] == ([host for host in lines.values() if host], "")
    assert parse(hostfile("\ufeffnode-a slots=2\r", "node-b\r"))[:2] == (["node-a|node-a||2", "node-b|node-b||"], "")


def test_duplicates_count_once_and_are_named_once(hostfile):
    hosts, messages, _ = parse(hostfile("a", "b slots=2", "A", "me@a", "b", " a # again", "b:22"))
    assert [host.split("|")[0] for host in hosts] == ["a", "b", "b:22"], "another sshd may be another host"
    assert messages.count("\n") == 1 and "counted once: A a b (N_GPUS_PER_NODE or slots=N give" in messages


@pytest.mark.parametrize(("hosts", "ranks"), [("aaabbb", 3), ("abab", 2), ("aa", 2), ("aab", 0)])
def test_hosts_named_equally_often_have_a_rank_for_each_time(hostfile, hosts, ranks):
    found, messages, _ = parse(hostfile(*hosts))
    assert [host.split("|")[3] for host in found] == [str(ranks or "")] * len({*hosts})
    assert (f"names each host {ranks} times: {ranks} ranks per host" in messages) == bool(ranks)
    assert parse(hostfile("a slots=4", "a", "b slots=4", "b"))[0] == ["a|a||4", "b|b||4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("node-a node-b", '"node-b" is not understood'),
        ("node-a:99999", "port 99999 is none"),
        ("node-a:8", "port 8 is none; after the colon comes that of the host's sshd, and its ranks are slots=N"),
        ("node-a slots=0", '"slots=0" is not understood'),
        ("2001:db8::9", "IPv6 in brackets"),
        ("-oProxyCommand=x", "is no host"),
        ("node-a;reboot", "is no host"),
    ],
)
def test_other_lines_are_errors_with_their_number(hostfile, line, message):
    hosts, messages, status = parse(hostfile("node-z", "# two", line))
    assert (hosts, status) == ([], 1)
    assert "my hosts, line 3: " in messages and message in messages


def test_the_head_starts_first_and_the_others_join(hostfile):
    path = hostfile("node-a", "node-b # a comment", "me@node-c:99 slots=4")
    lines = run(CLUSTER, "--dry-run", path, SSH_OPTS="-i '/my keys/id'", SSH_PORT=2222).stdout.splitlines()
    ssh, started = zip(*(line.split(" bash ") for line in lines if not line.startswith("[")), strict=True)
    assert all(r"-i /my\ keys/id" in words and "BatchMode=yes" in words for words in ssh)
    assert " -p 2222 " in ssh[4] and " -p 99 " in ssh[5]
    hosts = ["node-a", "node-b", "me@node-c"]
    assert [words.split()[-1] for words in ssh] == [*hosts, *hosts, "node-a"]
    assert started[:3] == (f"{RAY_NODE} state",) * 3
    assert started[3:5] == (f"{RAY_NODE} start node-a head node-b", f"{RAY_NODE} start node-b HEAD:6379")
    assert "nodes --wait 120" in started[6]
    alone = run(CLUSTER, "--dry-run").stdout
    assert "ssh" not in alone and f"localhost: bash {RAY_NODE} start localhost head" in alone


@pytest.fixture
def all_nodes(tmp_path, hostfile):
    """Runs deploy_env.sh --all-nodes over stand-ins for the hosts that a hostfile names."""
    stand_in("ssh", tmp_path / "bin dir" / "ssh")
    environment = stand_in("python_of_hosts", tmp_path / "my env" / "bin" / "python").parents[1]

    def call(*hosts, script=DEPLOY, arguments=("--all-nodes", "--device", "cpu"), **more):
        env = {"ENV_DIR": environment, "LOG_DIR": tmp_path / "my logs", "FAKE_SSH_LOG": tmp_path / "ssh.log"}
        env["PATH"] = f"{tmp_path / 'bin dir'}:{os.environ['PATH']}"
        return run(script, *arguments, hostfile(*hosts), cwd=tmp_path, **{**env, **more})

    return call


def test_deployment_to_all_hosts_ends_with_a_table(all_nodes, tmp_path):
    done = all_nodes("node-a", "node-b slots=2")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("node-")]
    versions = ["3.11.2", "2.13.0"]
    assert [[*row[:2], *row[3:5]] for row in rows] == [["node-a", "ok", *versions], ["node-b", "ok", *versions]]
    assert "was not made by this script and is used as it is" in (tmp_path / "my logs/deploy-node-a.log").read_text()
    assert all(line.endswith(" bash -s") for line in (tmp_path / "ssh.log").read_text().splitlines())


def test_hosts_that_fail_or_differ_are_named_with_the_end_of_their_logs(all_nodes):
    failures = {
        "node-gone": ("failed: ssh cannot reach it; the end of", "No route to host"),
        "node-locked": ("failed: its ssh refuses this user or key", "Permission denied"),
        "node-new": ("failed: its host key is not known here", "verification failed"),
        "node-broken": ("failed; the end of", "libfoo.so"),
    }
    done = all_nodes("node-a", *failures)
    assert done.returncode == 1 and "node-a: failed" not in done.stderr
    for host, (message, end_of_log) in failures.items():
        assert f"{host}: {message}" in done.stderr and end_of_log in done.stderr
    states = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("node-")]
    assert states == ["ok"] + ["failed"] * len(failures)
    done = all_nodes("node-a", "node-old", "node-b")
    assert done.returncode == 1 and "ray differs" not in done.stderr
    assert "torch differs between hosts: 2.13.0 on node-a, node-b; 2.12.0 on node-old" in done.stderr


def test_no_cluster_starts_with_a_host_that_cannot_take_part(all_nodes):
    for hosts, env, message in (
        (["node-a", "node-old"], {}, "torch differs between hosts"),
        (["node-a", "node-gone"], {}, "node-gone: cannot take part: ssh cannot reach it"),
        (["node-a"], {"ENV_DIR": "/no where"}, "there is no Python environment in /no where"),
    ):
        done = all_nodes(*hosts, script=CLUSTER, arguments=(), **env)
        assert done.returncode == 1 and message in done.stderr


def test_a_folder_name_too_long_for_rays_sockets_is_refused(tmp_path):
    python = 'case "$*" in *node_facts*) echo 10.0.0.1 eth0 2 0 ;; esac\n'
    environment = executable(tmp_path / "env" / "bin" / "python", f"#!/usr/bin/env bash\n{python}").parents[1]
    done = run(RAY_NODE, "start", "a", "head", ENV_DIR=environment, CLUSTER_DIR=f"/tmp/{'x' * 60}")
    assert done.returncode == 1
    assert "characters too long for Ray's sockets" in done.stderr


def test_stopping_ends_the_session_that_was_started_and_nothing_else(tmp_path):
    env = {"CLUSTER_DIR": tmp_path, "RAY_PORT": 6001}
    folder = tmp_path / run(RAY_NODE, "folder", **env).stdout.strip()
    folder.mkdir()
    # A leader that leaves a child behind, and a stranger whose number is taken for the leader's.
    ours = subprocess.Popen(["bash", "-c", "sleep 300 & sleep 300"], start_new_session=True)
    stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        (folder / "node").write_text(f"{stranger.pid} 1\n")
        assert "state stopped" in run(RAY_NODE, "stop", **env).stdout
        assert stranger.poll() is None
        began = Path(f"/proc/{ours.pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
        (folder / "node").write_text(f"{ours.pid} {began}\n")
        done = run(RAY_NODE, "stop", **env)
        assert done.returncode == 0, done.stderr
        assert ours.wait(timeout=10) != 0
        left = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(ours.pid)], capture_output=True, text=True).stdout
        assert not [line for line in left.splitlines() if "Z" not in line]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        ours.kill()


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "VLLM_PASSWD", "NCCL_SECRET_FILE", "HF_token", "HF_CREDENTIALS_FILE", "HF_PWD_")
PLAIN = ("NCCL_DEBUG", "HF_HOME", "VLLM_KEYBOARD", "TORCH_TOKENIZERS", "HF_AUTH_SOCK", "HF_COMPASS", "HF_TOKEN1")


VALUES = ("mlx5_0:1,mlx5_1:1", "%h #x = y", "a\"b'c", "", "two\nlines", "\\", "end\\", "${data.seed}", "007", "'名'")


def test_variables_are_passed_to_workers_as_they_are_and_without_secrets(hostfile, tmp_path, monkeypatch):
    names = (*SECRETS, *PLAIN)
    exported = dict.fromkeys(names, "1") | {f"UCX_{i}": value for i, value in enumerate(VALUES)}
    env = {**MODELS, **exported, "DRY_RUN": 1, "CLUSTER_DIR": tmp_path}
    lines = read_back(run(LAUNCH, hostfile("node-a slots=4", "node-b slots=4"), **env).stdout)
    assert {"trainer.n_gpus_per_node=4", "trainer.nnodes=2"} <= {*lines}
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    config = load_config([line for line in lines if "runtime_env" in line])
    passed = config.ray_kwargs.ray_init["runtime_env"]["env_vars"]
    assert passed == {name: value for name, value in exported.items() if name not in SECRETS}
    assert [name for name in names if looks_secret(name)] == [*SECRETS], "the run uses the same rule"


def test_hosts_with_different_slots_need_a_decision(hostfile):
    path = hostfile("node-a slots=4", "node-b slots=8")
    done = run(LAUNCH, path, DRY_RUN=1, **MODELS)
    assert done.returncode == 2 and "hosts differ in slots (4, 8)" in done.stderr
    assert "trainer.n_gpus_per_node=2" in run(LAUNCH, path, DRY_RUN=1, N_GPUS_PER_NODE=2, **MODELS).stdout


def test_fewer_slots_than_gpus_are_named(hostfile, tmp_path):
    executable(tmp_path / "nvidia-smi", "#!/usr/bin/env bash\nprintf 'GPU %s: x\\n' 0 1 2 3\n")
    env = {"DRY_RUN": 1, "PATH": f"{tmp_path}:{os.environ['PATH']}", **MODELS}
    for slots, notices in ((1, 1), (4, 0), (8, 0)):
        done = run(LAUNCH, hostfile(f"node-a slots={slots}", f"node-b slots={slots}"), **env)
        assert f"trainer.n_gpus_per_node={slots} \\\n" in done.stdout
        assert done.stderr.count("and this one has 4 GPUs; N_GPUS_PER_NODE=4 uses them all") == notices

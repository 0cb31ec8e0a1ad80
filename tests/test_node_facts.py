"""Which address a host takes, what it counts, and its errors for a used port and a head that does not answer."""

import socket
import subprocess
import sys

import pytest
from support.script_runner import executable

from scripts import node_facts

OWN = {"127.0.0.1": "lo", "10.0.0.1": "eth0", "fe80::1": "ib0", "2001:db8::7": "ib0", "10.1.0.1": "ib0"}


def test_an_interface_or_an_address_of_the_users_wins():
    assert node_facts.choose_address("10.1.0.1", "10.0.0.1", None, OWN) == "10.1.0.1"
    assert node_facts.choose_address("ib0", "10.0.0.1", None, OWN) == "10.1.0.1", "IPv4 before IPv6, no link-local one"
    with pytest.raises(ValueError, match="NODE_IP=eth9 is neither an address nor an interface here"):
        node_facts.choose_address("eth9", None, None, OWN)


def test_the_name_in_the_hostfile_counts_unless_it_means_the_loopback(monkeypatch):
    assert node_facts.choose_address(None, "10.0.0.1", None, OWN) == "10.0.0.1"
    # As on Debian, where a host's own name resolves to 127.0.1.1: the route to the others decides.
    monkeypatch.setattr(node_facts, "resolve", lambda name: ["127.0.1.1"])
    monkeypatch.setattr(node_facts, "route_from", {"node-b": "10.1.0.1"}.get)
    own = {**OWN, "127.0.1.1": "lo"}
    assert node_facts.choose_address(None, "node-a", "node-b", own) == "10.1.0.1"
    assert node_facts.choose_address(None, "node-a", None, own) == "127.0.0.1", "no route anywhere"


def test_gpus_are_those_that_are_listed_and_visible(tmp_path, monkeypatch):
    executable(tmp_path / "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: some"; done\necho "  MIG 1g"\n')
    cases = ((tmp_path, "0,1,2,3,4", 4), (tmp_path, "0,2", 2), (tmp_path, "", 0), (tmp_path / "nothing", "0", 0))
    for path, visible, count in cases:
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert node_facts.gpu_count() == count


def facts(*arguments, **env):
    command = [sys.executable, node_facts.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


def test_a_port_in_use_and_a_head_that_does_not_answer_are_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use by another program" in facts("--port", str(port)).stderr
        assert facts("--reach", f"127.0.0.1:{port}", "--node-ip", "203.0.113.9").returncode == 0, "it is the head's"
    done = facts("--reach", f"127.0.0.1:{port}")
    assert done.returncode == 1 and f"this host cannot reach the head at 127.0.0.1:{port}" in done.stderr
    assert facts("--port", str(port), NUM_CPUS="3", NUM_GPUS="1").stdout.split()[2:] == ["3", "1"]

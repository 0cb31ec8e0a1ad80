"""What a run on this machine tells Ray, and what it keeps from it."""

import os
import socket
from functools import partial

import pytest

from verl.single_controller.ray.session import session_arguments, start_session
from verl.utils.loopback import keep_to_loopback, stays_here

SET = ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"]
SET += ["VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "A_TOKEN", "RAY_TMPDIR", "TMPDIR"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables is set, and none stays set."""
    for name in SET:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_each_run_has_a_token_of_its_own_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    tokens = set()
    for _ in range(2):
        os.environ.pop("RAY_AUTH_TOKEN", None)
        keep_to_loopback()
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert [len(token) for token in tokens] == [64, 64]
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    keep_to_loopback()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_cluster_and_a_chosen_address_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stays_here({"num_cpus": 2})
    assert not stays_here({"address": "auto"})
    assert not stays_here({"_node_ip_address": "10.0.0.1"})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not stays_here({})
    assert "address" not in session_arguments({}), "Ray reads the variable"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert stays_here({})
    assert session_arguments({})["address"] == "local", "or it would join any cluster that was started here"


def test_a_head_that_is_gone_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"ray_init: address={address}: nothing answers at"):
            start_session({"address": address})
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"ray_init: RAY_ADDRESS={address}: nothing answers at"):
            start_session({})


@pytest.mark.parametrize(("name", "longest"), [("TMPDIR", 107 - 66), ("RAY_TMPDIR", 107 - 66), ("_temp_dir", 107 - 62)])
def test_a_folder_too_long_for_sockets_is_refused(name: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below it: /ray, /session_ with a time of 26 characters and the process id, /sockets/plasma_store; 66 in all."""
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    monkeypatch.setattr("ray.init", lambda **arguments: None)
    for folder in ("/" * longest, "/" * (longest + 1)):
        monkeypatch.setenv(name, folder)
        start = partial(start_session, {name: folder} if name == "_temp_dir" else {})
        if len(folder) == longest:
            start()
    with pytest.raises(ValueError, match=rf"\(of {name}\) is 1 bytes too long for Ray's sockets, .*at most 107"):
        start()


def test_secrets_stay_out_of_what_ray_logs(caplog: pytest.LogCaptureFixture) -> None:
    given = {"runtime_env": {"env_vars": {"A_TOKEN": "planted", "PLAIN": "1"}, "working_dir": "."}}
    here = session_arguments(given)["runtime_env"]
    assert here["working_dir"] == "." and here["env_vars"]["PLAIN"] == "1" and "A_TOKEN" not in here["env_vars"]
    assert os.environ.pop("A_TOKEN") == "planted"
    on_cluster = session_arguments({"address": "auto", **given})["runtime_env"]
    assert on_cluster["env_vars"]["A_TOKEN"] == "planted", "the only way to another machine"
    assert "logs on every node, and A_TOKEN with it" in caplog.text and "planted" not in caplog.text

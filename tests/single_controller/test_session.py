"""What a run on this machine tells Ray, and what it keeps from it."""

import os

import pytest

from verl.single_controller.ray.session import session_arguments
from verl.utils.loopback import keep_to_loopback, stays_here

SET = ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"]
SET += ["VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "A_TOKEN"]


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


def test_secrets_stay_out_of_what_ray_logs(caplog: pytest.LogCaptureFixture) -> None:
    given = {"runtime_env": {"env_vars": {"A_TOKEN": "planted", "PLAIN": "1"}, "working_dir": "."}}
    here = session_arguments(given)["runtime_env"]
    assert here["working_dir"] == "." and here["env_vars"]["PLAIN"] == "1" and "A_TOKEN" not in here["env_vars"]
    assert os.environ.pop("A_TOKEN") == "planted"
    on_cluster = session_arguments({"address": "auto", **given})["runtime_env"]
    assert on_cluster["env_vars"]["A_TOKEN"] == "planted", "the only way to another machine"
    assert "logs on every node, and A_TOKEN with it" in caplog.text and "planted" not in caplog.text

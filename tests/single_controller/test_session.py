"""What a run on this machine tells Ray, and what it keeps from it."""

import os
import socket
from pathlib import Path

import pytest

from verl.single_controller.ray import session
from verl.single_controller.ray.session import cluster_device, session_arguments, start_session
from verl.utils.import_utils import EXTERNAL_MODULES
from verl.utils.loopback import joins_cluster, keep_to_loopback, stays_here

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
    assert not stays_here({"_node_ip_address": "10.0.0.1"}) and not joins_cluster({"_node_ip_address": "10.0.0.1"})
    assert session_arguments({})["address"] == "local", "never a Ray that is up here by chance, whose token is another"
    assert stays_here({"address": None}) and stays_here({"address": "local"})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joins_cluster({}) and not stays_here({}) and "address" not in session_arguments({})
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert stays_here({})
    for given in ({}, {"address": None}):
        arguments = session_arguments(given)
        assert arguments["address"] == "local", "or it would join any cluster that was started here"


def test_a_head_that_is_gone_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"ray_init: address={address}: nothing answers at"):
            start_session({"address": address})
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"ray_init: RAY_ADDRESS={address}: nothing answers at"):
            start_session({})


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot exceed 107 bytes: .*/sockets/.* below _temp_dir, RAY_TMPDIR or TMPDIR"
    ):
        start_session({"_temp_dir": str(tmp_path / ("a" * 107))})


@pytest.mark.parametrize(
    ("setting", "gpus", "device"), [("auto", 4, "cuda"), ("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("cuda", 4, "cuda")]
)
def test_the_cluster_decides_what_models_run_on(
    monkeypatch: pytest.MonkeyPatch, setting: str, gpus: int, device: str
) -> None:
    """Whatever the driver's machine has, which may be a head without GPUs."""
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)} if gpus else {})
    assert cluster_device(setting) == device
    monkeypatch.setattr(session.ray, "cluster_resources", dict)
    with pytest.raises(ValueError, match=r"trainer\.device='cuda', and no node of the cluster has a GPU"):
        cluster_device("cuda")


def test_workers_of_a_cluster_import_what_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXTERNAL_MODULES, "mine")
    assert session_arguments({"address": "auto"})["runtime_env"]["env_vars"][EXTERNAL_MODULES] == "mine"


def test_secrets_stay_out_of_what_ray_logs(caplog: pytest.LogCaptureFixture) -> None:
    given = {"runtime_env": {"env_vars": {"A_TOKEN": "planted", "PLAIN": "1"}, "working_dir": "."}}
    here = session_arguments(given)["runtime_env"]
    assert here["working_dir"] == "." and here["env_vars"]["PLAIN"] == "1" and "A_TOKEN" not in here["env_vars"]
    assert os.environ.pop("A_TOKEN") == "planted"
    on_cluster = session_arguments({"address": "auto", **given})["runtime_env"]
    assert on_cluster["env_vars"]["A_TOKEN"] == "planted", "the only way to another machine"
    assert "logs on every node, and A_TOKEN with it" in caplog.text and "planted" not in caplog.text

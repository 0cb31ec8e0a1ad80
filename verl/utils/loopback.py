"""Keeps a run on one machine to that machine: its sockets listen on the loopback alone, and Ray needs a token.

In: the environment of the driver, before Ray is imported. Out: the same, which every process of the run inherits. What
the user set there stays. Not here: clusters, whose nodes have to reach each other; ``init_ray_cluster.sh`` gives them a
token and their own interface.
"""

import os
import secrets
from collections.abc import Mapping
from typing import Any


def joins_cluster(ray_init: Mapping[str, Any]) -> bool:
    """Whether a run with these arguments of ``ray.init`` joins a cluster that is there: one is named, or the run was
    submitted to one (``ray job submit`` sets ``RAY_ADDRESS``)."""
    return (ray_init.get("address") or os.environ.get("RAY_ADDRESS") or "local") != "local"


def stays_here(ray_init: Mapping[str, Any]) -> bool:
    """Whether a run with these arguments of ``ray.init`` starts a Ray of its own, at an address that nobody chose."""
    return not joins_cluster(ray_init) and "_node_ip_address" not in ray_init


def keep_to_loopback() -> None:
    """Have Ray, gloo, NCCL and vLLM listen on the loopback only, and Ray serve nobody without this run's token.

    The token is in the environment alone, which other users of the machine cannot read; Ray's own way is a file that
    they can.
    """
    # Named for the systems on which it is the default: Ray's nodes then have the address of the loopback, and no other.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")

"""What runs on one rank.

A worker group starts one process per rank and tells it its place through environment variables; ``Worker`` reads
them. Models, devices and the choice of a communication backend belong to the subclasses.
"""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.base.object_store import InProcessObjectStore, ObjectStore

LOOPBACK = "127.0.0.1"


class Worker:
    """Base of all workers: this rank's place among the others.

    Outside of a group (no ``RANK`` in the environment) a worker is rank 0 of 1.
    """

    def __init__(self) -> None:
        env = os.environ
        self.rank = int(env.get("RANK", "0"))
        """This process among all, from 0."""
        self.world_size = int(env.get("WORLD_SIZE", "1"))
        """Number of processes."""
        self.local_rank = int(env.get("LOCAL_RANK", "0"))
        """This process among those of its node, from 0."""
        self.local_world_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        """Number of processes on this node."""
        self.node_id = env.get("VERL_NODE_ID", "")
        """The scheduler's name of this node."""
        self.node_ip = env.get("VERL_NODE_IP", "127.0.0.1")
        """Address of this node."""
        self.colocated_roles: Mapping[str, Worker] = {}
        """The workers of this process by role, this one among them; filled once all of them are built."""
        self.object_store: ObjectStore = InProcessObjectStore()
        """How this worker hands values to other ranks past the driver; a worker group puts its own way here."""

    def init_process_group(self, backend: str, timeout_s: float = 1800.0) -> None:
        """Join ``torch.distributed``; a second call in one process (co-located roles) does nothing.

        Args:
            backend: such as ``gloo`` or ``cpu:gloo,cuda:nccl``.
            timeout_s: seconds until a collective that waits for a rank gives up.
        """
        if dist.is_initialized():
            return
        timeout = timedelta(seconds=timeout_s)
        store = self._meeting_place(timeout)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)

    def _meeting_place(self, timeout: timedelta) -> dist.Store:
        """The store that rank 0 serves. Ranks of one machine meet on its loopback, where torch by itself would listen
        on all interfaces.
        """
        address, port = LOOPBACK, 0  # a lone rank meets nobody: whichever port is free
        if self.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = None
        if self.rank == 0 and address == LOOPBACK:
            server = socket.create_server((address, port))
            port, listener = server.getsockname()[1], server.detach()
        return dist.TCPStore(
            address, port, self.world_size, self.rank == 0, timeout, multi_tenant=True, master_listen_fd=listener
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def get_placement(self) -> dict[str, Any]:
        """Where this rank runs: node, ranks, and its GPUs as ``CUDA_VISIBLE_DEVICES`` names them (None without)."""
        return {
            "node_id": self.node_id,
            "node_ip": self.node_ip,
            "rank": self.rank,
            "local_rank": self.local_rank,
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES") or None,
        }

"""What runs on one rank.

A worker group starts one process per rank and tells it its place through environment variables; ``Worker`` reads
them. Models, devices and the choice of a communication backend belong to the subclasses.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.base.loans import InProcessLoans, Loans


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
        self.peers: Mapping[str, Worker] = {}
        """The workers of this process by role, this one among them; filled once all of them are built."""
        self.loans: Loans = InProcessLoans()
        """How this worker hands values to other ranks past the driver; a worker group puts its own way here."""

    def init_process_group(self, backend: str, timeout_s: float = 1800.0) -> None:
        """Join ``torch.distributed``; a second call in one process (co-located roles) does nothing.

        Args:
            backend: such as ``gloo`` or ``cpu:gloo,cuda:nccl``.
            timeout_s: seconds until a collective that waits for a rank gives up.
        """
        if dist.is_initialized():
            return
        # A lone rank meets nobody: port 0 is whichever is free.
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if self.world_size > 1 else "127.0.0.1:0"
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_s),
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

"""The base of what runs on one rank, and how a worker hands large values to other ranks past the driver.

A worker group starts one process per rank and passes its place in environment variables; ``Worker`` reads them.
Models, devices and the choice of a communication backend belong to the subclasses.

    rank that puts ── handle ──► driver ── handle ──► rank that gets
          └──────────────────── the value ───────────────────┘

A value lives as long as a handle to it does. A handle may travel in a batch, as any Python object.

To processes that are no workers rank 0 sends tensors by a `Channel`.
"""

import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from verl.single_controller.base.decorator import Dispatch, Execute, register

LOOPBACK = "127.0.0.1"


def find_free_port() -> int:
    """A port of this machine that nothing listens on.

    Below the range that outgoing connections draw from (32768 on Linux): Ray opens many of those before rank 0 listens.
    """
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError("100 ports tried between 20000 and 32000 are all in use on this machine")


class InProcessObjectStore:
    """Where workers of one process put values that are too large for the driver; on a cluster Ray's store is used."""

    def put(self, value: Any) -> Callable[[], Any]:
        """A small handle to a value, which nobody may change from now on."""
        return lambda: value  # a handle has to be hashable, and to keep the value as long as it lives

    def get(self, handles: Sequence[Callable[[], Any]]) -> list[Any]:
        """The values of handles, wherever these were made; waits for them."""
        return [handle() for handle in handles]


class Channel:
    """A process group for weights: rank 0 of the workers broadcasts, engines receive. NCCL on GPUs, gloo on CPUs.

    The constructor returns once every member has called it.

    Args:
        rendezvous: what `Worker.open_channel` returned.
        rank: number of this member; 0 sends.
        store: the sender's, where the others meet.
    """

    def __init__(
        self, rendezvous: Mapping[str, Any], rank: int, device: torch.device, store: dist.TCPStore | None = None
    ) -> None:
        self._device, size, timeout = device, rendezvous["size"], timedelta(seconds=rendezvous["timeout_s"])
        store = store or dist.TCPStore(rendezvous["address"], rendezvous["port"], is_master=False, timeout=timeout)
        # Not by init_process_group: the default group exists already, with other members.
        self._group, kinds = dist.ProcessGroup(store, rank, size), dist.ProcessGroup.BackendType
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group._register_backend(device, kinds.NCCL, dist.ProcessGroupNCCL(store, rank, size, options))
        else:
            self._group._register_backend(device, kinds.GLOO, dist.ProcessGroupGloo(store, rank, size, timeout))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor, or receive into it."""
        self._group.broadcast(tensor.flatten().view(torch.uint8), 0).wait()

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What the sender broadcasts now, a tensor of this shape."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self.broadcast(tensor)
        return tensor


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
        """Rank on this node, from 0."""
        self.local_world_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        """Number of processes on this node."""
        self.node_id = env.get("VERL_NODE_ID", "")
        """The scheduler's name of this node."""
        self.node_ip = env.get("VERL_NODE_IP", LOOPBACK)
        """Address of this node."""
        self.channel: Channel | None = None
        """To other processes, on rank 0, once it was joined."""
        self.attach({}, InProcessObjectStore())

    def attach(self, colocated_roles: Mapping[str, "Worker"], object_store: Any) -> None:
        """Get to know the workers of this process by role, this one among them, once all of them are built.

        Args:
            object_store: the store that all ranks of the run share, with `put` and `get`.
        """
        self.colocated_roles, self.object_store = colocated_roles, object_store

    def init_process_group(self, backend: str, timeout_s: float = 1800.0) -> None:
        """Join ``torch.distributed``; a second call in one process (co-located roles) does nothing.

        Args:
            backend: such as ``gloo`` or ``cpu:gloo,cuda:nccl``.
            timeout_s: seconds until a collective that waits for a rank gives up.
        """
        if dist.is_initialized():
            return
        timeout = timedelta(seconds=timeout_s)
        address, port = LOOPBACK, 0  # a lone rank meets nobody: whichever port is free
        if self.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = None
        if self.rank == 0 and address == LOOPBACK:
            # Ranks of one machine meet on its loopback, where torch by itself would listen on all interfaces.
            server = socket.create_server((address, port))
            # Without detach Python would close the socket that the store listens on.
            port, listener = server.getsockname()[1], server.detach()
        store = dist.TCPStore(
            address, port, self.world_size, self.rank == 0, timeout, multi_tenant=True, master_listen_fd=listener
        )
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def open_channel(self, size: int, timeout_s: float) -> dict[str, Any]:
        """Where ``size - 1`` other processes meet rank 0 as a `Channel`, and what each has to know."""
        server = socket.create_server((self.node_ip, 0))
        port = server.getsockname()[1]
        # Torch by itself would listen on all interfaces. Without detach Python would close the socket.
        options: dict[str, Any] = {"wait_for_workers": False, "master_listen_fd": server.detach()}
        timeout = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(self.node_ip, port, is_master=True, timeout=timeout, **options)
        self._rendezvous = {"address": self.node_ip, "port": port, "size": size, "timeout_s": timeout_s}
        return self._rendezvous

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def join_channel(self, device: str) -> None:
        """Meet the others, which join the channel now; tensors will be on this kind of device."""
        self.channel = Channel(self._rendezvous, 0, torch.device(device), self._store)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def get_placement(self) -> dict[str, Any]:
        """Where this rank runs: node, ranks, and its GPUs as ``CUDA_VISIBLE_DEVICES`` names them (None without)."""
        place = {name: getattr(self, name) for name in ("node_id", "node_ip", "rank", "local_rank")}
        return place | {"cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES") or None}

"""The driver's Ray: a cluster that is there, or one of this run's own.

In: the arguments of ``ray.init`` and what to add to them. Out: a connection, or an error with its fix.

A signal to the driver's process group or to every process of a job, as terminals and schedulers send it, is meant for
the run, and the driver alone decides what becomes of the current step. So Ray's daemons get process groups of their own
and SIGTERM blocked, which all that they start inherits; Ray itself does no more than block SIGINT. The price: daemons
ignore Ray's own SIGTERM too, and are killed a second later, four seconds in all.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address

from verl.utils.import_utils import EXTERNAL_MODULES
from verl.utils.loopback import joins_cluster, stays_here
from verl.utils.redaction import looks_secret

logger = logging.getLogger(__name__)

QUIET_PROCESSES = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "NCCL_DEBUG": "WARN",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
"""Environment of every Ray process, where the user has set nothing else: threads that spin while they wait make a busy
machine ten times slower, libraries would write the same lines once per rank, and glibc would give the memory of large
tensors back to the system and fetch it again in every operation: a tenth of a small model's update."""


def start_session(ray_init: Mapping[str, Any]) -> None:
    """Connect to the cluster that ``ray_init`` names, or start Ray here.

    Raises:
        ValueError: no Ray answers, or an argument cannot be used.
    """
    arguments = session_arguments(ray_init)
    try:
        _check_head(arguments.get("address"))
        with own_process_group():
            ray.init(**arguments)
    except (OSError, ValueError) as error:
        # Among them Ray's own about names of sockets that are too long.
        fix = "init_ray_cluster.sh starts a cluster; Ray's files are below _temp_dir, RAY_TMPDIR or TMPDIR"
        raise ValueError(f"ray_kwargs.ray_init: {error} ({fix})") from error


def _check_head(given: str | None) -> None:
    """Raise ValueError where nothing answers at the address of a cluster's head: Ray would wait for it in vain."""
    if head := canonicalize_bootstrap_address(given):
        variable = os.environ.get("RAY_ADDRESS") if given in (None, "auto") else None
        host, _, port = head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            source = f"RAY_ADDRESS={variable}" if variable else f"address={given}"
            raise ValueError(f"{source}: nothing answers at {head} ({error}); correct or unset it") from error


@contextmanager
def own_process_group() -> Iterator[None]:
    """Every process that this one starts within the block gets a process group of its own, and SIGTERM blocked."""
    _in_own_group.set()
    try:
        yield
    finally:
        _in_own_group.clear()


def _leave_process_group() -> None:
    if _in_own_group.is_set():
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


_in_own_group = threading.Event()
# Ray's arguments do not reach the moment between fork and exec. Python calls this hook there where ``subprocess`` got a
# ``preexec_fn``, as from Ray.
os.register_at_fork(after_in_child=_leave_process_group)


def session_arguments(ray_init: Mapping[str, Any]) -> dict[str, Any]:
    """``ray_init`` over our defaults: no dashboard on a run of its own, quiet processes.

    Ray writes a ``runtime_env`` into its logs. On this machine secrets avoid it, through the environment that all
    processes inherit; on a cluster there is no other way to the workers, and a warning names them.
    """
    given = {name: value for name, value in ray_init.items() if value is not None}
    runtime_env = dict(given.pop("runtime_env", {}))
    quiet = {name: os.environ.get(name, value) for name, value in QUIET_PROCESSES.items()}
    modules = {name: os.environ[name] for name in [EXTERNAL_MODULES] if name in os.environ}
    env_vars = {**quiet, **modules, **runtime_env.pop("env_vars", {})}
    secrets = [name for name in env_vars if looks_secret(name)]
    if stays_here(ray_init):
        os.environ.update({name: env_vars.pop(name) for name in secrets})
    elif secrets:
        logger.warning("Ray writes its runtime_env into its logs on every node, and %s with it", ", ".join(secrets))
    # Without an address Ray would join whatever cluster was started here before.
    defaults: dict[str, Any] = {} if joins_cluster(ray_init) else {"address": "local", "include_dashboard": False}
    return {**defaults, **given, "runtime_env": {**runtime_env, "env_vars": env_vars}}


def cluster_device(setting: str) -> str:
    """``cuda`` or ``cpu``: what ``trainer.device`` means on the cluster, whatever the driver's machine has.

    Raises:
        ValueError: ``cuda`` where no node has a GPU.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if setting == "cuda" and not gpus:
        raise ValueError("trainer.device='cuda', and no node of the cluster has a GPU; use trainer.device=cpu or auto")
    device = "cuda" if gpus and setting != "cpu" else "cpu"
    logger.info("the cluster has %d GPUs: models run on %s (trainer.device=%s)", gpus, device, setting)
    return device


def end_session(timeline_folder: str | None) -> None:
    """Disconnect, and end a Ray of this run's own with all its processes.

    Args:
        timeline_folder: receives Ray's timeline first; None: none.
    """
    if timeline_folder and ray.is_initialized():
        try:
            os.makedirs(timeline_folder, exist_ok=True)
            ray.timeline(filename=os.path.join(timeline_folder, "timeline.json"))
        except Exception as error:  # a full disk, a cluster that is gone: the run's own exit code counts
            logger.warning("Ray's timeline cannot be written to %s: %s", timeline_folder, error)
    # Some of Ray's helpers wait a minute for a Ray that has gone; one whose start was interrupted may leave more.
    started = []
    # Listed before the shutdown, which makes orphans of some: then they are no children of this process.
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if "ray::" in title or "/ray/" in title:
                started.append(process)
    ray.shutdown()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()

"""The driver's Ray: a cluster that is there, or one of this run's own.

In: the arguments of ``ray.init`` and what to add to them. Out: a connection, and an error that tells the fix.

A signal to the driver's process group or to every process of a job, as terminals and schedulers send it, is meant for
the run, and the driver alone decides what becomes of the step that is under way. So Ray's daemons get process groups of
their own and SIGTERM blocked, which all that they start inherits. Ray itself does no more than block SIGINT. The price:
daemons do not heed Ray's SIGTERM either, and are killed a second later, four seconds in all.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from verl.utils.loopback import stays_here
from verl.utils.redaction import looks_secret

logger = logging.getLogger(__name__)

QUIET_PROCESSES = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every Ray process: threads that spin while they wait make a busy machine ten times slower."""


def start_session(ray_init: Mapping[str, Any]) -> None:
    """Connect to the cluster that ``ray_init`` names, or start Ray here.

    Raises:
        ValueError: no Ray answers, or an argument cannot be used.
    """
    try:
        with own_process_group():
            ray.init(**session_arguments(ray_init))
    except ConnectionError as error:
        raise ValueError(
            f"no Ray answers at ray_kwargs.ray_init.address; start it: init_ray_cluster.sh HOSTFILE ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"ray_kwargs.ray_init={dict(ray_init)}: {error}") from error


@contextmanager
def own_process_group() -> Iterator[None]:
    """What this process forks within the block gets a process group of its own, and SIGTERM blocked."""
    _forking_apart.set()
    try:
        yield
    finally:
        _forking_apart.clear()


def detach_loader() -> None:
    if _forking_apart.is_set():
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


_forking_apart = threading.Event()
# Between fork and exec, where no argument of Ray's reaches: Python calls it where there is a ``preexec_fn``, as Ray's.
os.register_at_fork(after_in_child=detach_loader)


def session_arguments(ray_init: Mapping[str, Any]) -> dict[str, Any]:
    """``ray_init`` over our defaults: no dashboard on a run of its own, quiet processes.

    Ray writes a ``runtime_env`` into its logs. On this machine secrets go past it, through the environment that all
    processes inherit; on a cluster there is no other way to the workers, which is said.
    """
    given = dict(ray_init)
    runtime_env = dict(given.pop("runtime_env", {}))
    env_vars = {**QUIET_PROCESSES, **runtime_env.pop("env_vars", {})}
    secrets = [name for name in env_vars if looks_secret(name)]
    if stays_here(ray_init):
        os.environ.update({name: env_vars.pop(name) for name in secrets})
    elif secrets:
        logger.warning("Ray writes its runtime_env into its logs on every node, and %s with it", ", ".join(secrets))
    defaults: dict[str, Any] = {} if "address" in given else {"include_dashboard": False}
    return {**defaults, **given, "runtime_env": {**runtime_env, "env_vars": env_vars}}


def end_session(timeline_folder: str | None) -> None:
    """Disconnect, and end a Ray of this run's own with all its processes.

    Args:
        timeline_folder: receives Ray's timeline first; None: none.
    """
    if timeline_folder:
        os.makedirs(timeline_folder, exist_ok=True)
        ray.timeline(filename=os.path.join(timeline_folder, "timeline.json"))
    started = _own_ray_processes()
    ray.shutdown()
    for process in started:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def _own_ray_processes() -> list[int]:
    """Handles of Ray's processes that descend from this one.

    Some of Ray's helpers wait a minute for a Ray that has gone; one whose start was interrupted may leave more.
    """
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
    handles = []
    for pid, title in titles.items():
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() != pid and ("ray::" in title or "/ray/" in title):
            with suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
    return handles

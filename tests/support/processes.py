"""Processes of a run that is to be killed: who is there, what each of them is, and who is left.

Linux alone. `adopt_orphans` makes this process the parent of everything below it that loses its own, so that `below`
finds what a killed run left, whatever it is called.
"""

import ctypes
import os
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They hold no model and no port of the run, and wait a minute for Ray's head before they end after it."""
TITLES = {"rank": ("ray::WorkerHost",), "engine": ("ray::HFReplica", "ray::VLLMReplica", "VLLM::")}
"""How titles of the processes begin, by what they are."""


def adopt_orphans() -> None:
    """From now on, what is orphaned below this process becomes its child.

    Raises:
        OSError: the system refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def below(driver: int) -> list[psutil.Process]:
    """What runs below this process, the driver left out; adopted zombies are reaped, for Ray takes them for alive."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.pid == driver:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return running


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing once it is gone."""
    with suppress(psutil.NoSuchProcess, IndexError):
        return process.cmdline()[0]
    return ""


def of_kind(kind: str, driver: int) -> list[int]:
    """Ids of the run's processes of one kind: ``driver``, ``rank`` or ``engine``."""
    if kind == "driver":
        return [driver]
    return sorted(process.pid for process in below(driver) if title(process).startswith(TITLES[kind]))


def wait_gone(driver: int, timeout_s: float, spared: Iterable[str] = ()) -> list[str]:
    """Titles of what still runs after ``timeout_s``, but for those that begin as ``spared`` do."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [name for name in map(title, below(driver)) if name and not name.startswith(tuple(spared))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)

"""A long program in a process of its own, for which a signal to this one waits."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


def run_child(command: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None) -> int:
    """The exit code of a command. SIGINT and SIGTERM are passed on to it and end this process once it has ended: a
    trainer finishes its step and saves.

    Raises:
        SystemExit: a signal came; with the command's exit code, or that of the signal where it is none.
    """
    child: subprocess.Popen[bytes] | None = None
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, env=env)
        for number in came[:1]:  # before there was a child
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise SystemExit(code if code > 0 else 128 + came[0])  # also where it reached its end all the same
    return code

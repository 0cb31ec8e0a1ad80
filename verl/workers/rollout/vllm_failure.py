"""Why a vLLM engine that runs in processes of its own is dead.

vLLM tells its client no more than "see the stack trace above". Here its processes append their errors to a file
(``VLLM_LOGGING_CONFIG_PATH``), and the replica keeps the process handles. Out: one line with the cause.
"""

import multiprocessing
import re
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

_EXCEPTION_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .+)?$")


class EngineProcesses:
    """The processes an engine started, and the file with their errors."""

    def __init__(self, error_log: Path) -> None:
        self._error_log = error_log
        self._before = set(multiprocessing.active_children())
        self._processes: list[BaseProcess] = []

    def remember(self) -> None:
        """Take note of the children that were started since this object was made."""
        self._processes = [child for child in multiprocessing.active_children() if child not in self._before]

    def cause_of_death(self) -> str:
        """What the engine's processes logged last, and how those that ended did."""
        ended = [
            f"process {child.name} (pid {child.pid}) {describe_exit(child.exitcode)}"
            for child in self._processes
            if child.exitcode not in (None, 0)
        ]
        logged = last_exception(self._error_log)
        return "; ".join([*([logged] if logged else []), *ended]) or "its processes left no error"


def describe_exit(exit_code: int | None) -> str:
    """An exit code in words; negative codes are signals."""
    if exit_code is None or exit_code >= 0:
        return f"exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps for want of memory" if -exit_code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def last_exception(error_log: Path) -> str | None:
    """The first line of the log that ends a traceback (later ones follow from it), else its last line, if any."""
    if not error_log.is_file():
        return None
    lines = [line.strip() for line in error_log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    return next(filter(_EXCEPTION_LINE.match, lines), lines[-1] if lines else None)

"""SIGTERM and Ctrl-C: a request to stop, which the loop grants at the end of its step.

::

    starting        a signal ─► KeyboardInterrupt: there is nothing to lose yet
    taking steps    the first ─► noted, the loop looks at it once a step ─► saves and leaves
                    another one, or grace_s after the first ─► KeyboardInterrupt
    leaving         ignored: the processes are being ended

The same signal within a second counts once: a scheduler that signals every process of a job reaches the launch script
too, which passes it on. KeyboardInterrupt is what ends Ray's waits. The other processes of a run ignore both signals:
``single_controller.ray.session`` starts them so.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

ECHO_S = 1.0
"""Seconds within which the same signal counts once."""
AGAIN_S = 2.0
"""Seconds between KeyboardInterrupts after the grace; one raised in a destructor is lost."""


class StopRequest:
    """Listens to the signals of this process; see the module."""

    def __init__(self, grace_s: float = 0.0) -> None:
        """``grace_s``: seconds from the first signal until the run leaves at once."""
        self.number: int | None = None
        """The signal that came first; None: the run goes on."""
        self.takes_steps = False
        """Whether there are steps to finish, rather than a start that may be broken off."""
        self._grace_s = grace_s
        self._left = threading.Event()
        self._before: dict[int, Any] = {}
        self._echo_until = 0.0

    @property
    def requested(self) -> bool:
        """Whether the run should end with this step."""
        return self.number is not None

    @property
    def name(self) -> str:
        """Name of the signal."""
        return signal.Signals(self.number or signal.SIGINT).name

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + (self.number or signal.SIGINT)

    def listen(self) -> None:
        """Take the signals over; once more where a library has taken them since."""
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, self._on_signal)
            # A second call finds a library's handler, which is not the one to restore.
            self._before.setdefault(number, before)

    def leave(self) -> None:
        """The end has begun: further signals change nothing."""
        self._left.set()

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        self.leave()
        for number, before in self._before.items():
            signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._left.is_set() or (number == self.number and time.monotonic() < self._echo_until):
            return
        is_first = self.number is None
        if is_first:
            self.number, self._echo_until = number, time.monotonic() + ECHO_S
        if not (is_first and self.takes_steps):
            raise KeyboardInterrupt
        # Not through a stream: the signal may have come in the middle of a write to it.
        message = f"{self.name}: this step is finished and saved, within {self._grace_s:g} s; again to leave at once\n"
        os.write(2, message.encode())
        threading.Thread(target=self._remind, args=(number,), name="grace", daemon=True).start()

    def _remind(self, number: int) -> None:
        wait_s = self._grace_s
        while not self._left.wait(wait_s):
            # Else a reminder within ECHO_S of the first signal would count as its echo.
            self._echo_until = 0.0
            # Python runs handlers in the main thread alone, so KeyboardInterrupt is raised there, not in this thread.
            os.kill(os.getpid(), number)
            wait_s = AGAIN_S

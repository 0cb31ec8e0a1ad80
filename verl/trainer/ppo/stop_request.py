"""SIGTERM and Ctrl-C: a wish to stop, which the loop grants at the end of its step.

::

    starting        a signal ─► KeyboardInterrupt: there is nothing to lose yet
    taking steps    the first ─► noted, the loop asks for it once a step ─► saves and leaves
                    a second one, or grace_s after the first ─► KeyboardInterrupt
    leaving         ignored: the processes are being ended

KeyboardInterrupt is what passes through Ray's waits. The other processes of a run heed neither signal:
``single_controller.ray.session`` starts them so.
"""

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_S = 2.0
"""Seconds between reminders once the grace is over: an interrupt that falls into a destructor is lost."""


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
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should end with this step."""
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal, in words."""
        return signal.Signals(self.number or signal.SIGINT).name

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + (self.number or signal.SIGINT)

    def listen(self) -> None:
        """Take the signals over; once more where a library has taken them since."""
        for number in SIGNALS:
            before = signal.signal(number, self._on_signal)
            self._before.setdefault(number, before)

    def leave(self) -> None:
        """The end has begun: further signals change nothing."""
        self._left.set()

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        self.leave()
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._left.is_set():
            return
        first, self.number = self.number is None, self.number or number
        if not (first and self.takes_steps):
            raise KeyboardInterrupt
        # Not through a stream: the signal may have come in the middle of a write to it.
        message = f"{self.name}: this step is finished and saved, within {self._grace_s:g} s; again to leave at once\n"
        os.write(2, message.encode())
        threading.Thread(target=self._remind, args=(number,), name="grace", daemon=True).start()

    def _remind(self, number: int) -> None:
        patience = self._grace_s
        while not self._left.wait(patience):
            os.kill(os.getpid(), number)
            patience = AGAIN_S

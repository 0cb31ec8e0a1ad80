"""What vLLM's own worker processes do for a replica besides their work: end when it does.

A replica that is killed (out of memory, Ctrl-C) cannot stop its engine, and vLLM's processes would wait for it for
ever, GPU memory in hand. Methods of the extension are called through ``collective_rpc``.
"""

import os
import select
import threading


class WorkerExtension:
    """Mixed into vLLM's worker class (``worker_extension_cls``)."""

    def exit_with_replica(self, pid: int) -> None:
        """From now on, end this process as soon as process ``pid`` has ended; vLLM's other processes follow."""
        process = os.pidfd_open(pid)
        threading.Thread(target=_exit_after, args=(process,), name="exit-with-replica", daemon=True).start()


def _exit_after(process: int) -> None:
    select.select([process], [], [])
    os._exit(1)

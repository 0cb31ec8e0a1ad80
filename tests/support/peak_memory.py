"""The most memory that this program has had resident, for programs that tests start to measure it."""

import re
from pathlib import Path


def peak_kib() -> int:
    """Since the program started: ``VmHWM``. What ``getrusage`` gives is never less than what the parent had at its
    largest when it started the program, and hides all that stays below.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux tells the peak of every process"
    return int(found[1])

"""A program that is run to its end, and signals on the way."""

import signal
import subprocess
import sys

import pytest
from support.tiny_pairs import REPO

from recipe.onpolicy_distill.quickstart.child import run_child

CHILD = "import signal, sys, time; signal.signal({}, lambda *_: sys.exit({})); print('up', flush=True); time.sleep(60)"
PARENT = "import sys; from {} import run_child; run_child([sys.executable, '-c', {!r}])"


@pytest.mark.parametrize(
    ("number", "own", "seen"), [(signal.SIGINT, 7, 7), (signal.SIGTERM, 7, 7), (signal.SIGTERM, 0, 143)]
)
def test_a_signal_is_passed_on_and_the_child_is_waited_for(number: signal.Signals, own: int, seen: int) -> None:
    code = PARENT.format(run_child.__module__, CHILD.format(int(number), own))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(20) == seen


def test_its_exit_code_and_the_handlers_of_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_child([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert signal.getsignal(signal.SIGTERM) is before

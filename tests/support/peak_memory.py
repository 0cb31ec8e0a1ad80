"""How much memory divergences take at the real vocabulary size.

Run as a program, ``peak_memory.py POSITIONS TOPK``, so that what a process had at its peak before does not disturb it;
prints MiB.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.teacher_log_probs import LinearTeacher, TeacherLogProbs, score_tokens
from verl.vocabulary import Vocabulary

REPO = Path(__file__).resolve().parents[2]
VOCABULARY, TEACHER_IDS = 176_384, 151_669


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def measure(*arguments: object) -> float:
    """Run this file as a program; the number that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests")))}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def peak_mib() -> float:
    """Peak since the program started: ``VmHWM``. ``getrusage`` would include that of the parent when it forked."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux tells the peak of every process"
    return int(found[1]) / 1024


def diverge(positions: str, topk: str) -> None:
    """Growth over an exact divergence with gradients; with ``topk`` the likeliest ids are found first."""
    count, hidden_size = int(positions), 8
    hidden = torch.randn(count, hidden_size, requires_grad=True)
    weight = torch.randn(VOCABULARY, hidden_size, requires_grad=True)
    teacher = LinearTeacher(torch.randn(count, hidden_size), torch.randn(TEACHER_IDS, hidden_size), TEACHER_IDS)
    weights, labels = torch.full((count,), 1 / count), torch.zeros(count, dtype=torch.int64)
    before = peak_mib()
    compared: TeacherLogProbs = teacher
    if int(topk):
        top = score_tokens(teacher, labels, -100.0, topk=int(topk))[1]
        assert top is not None, "topk is given"
        compared = top.rows
    options, vocabulary = DivergenceOptions(leak_coef=1.0), Vocabulary(VOCABULARY, TEACHER_IDS)
    linear_divergence(hidden, weight, weights, compared, options, labels, vocabulary)[0].backward()
    print(peak_mib() - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    diverge(*sys.argv[1:])

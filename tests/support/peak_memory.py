"""How much memory scoring, training and divergences take at the real vocabulary size.

Run as a program, ``peak_memory.py model FOLDER ROWS ...`` or ``peak_memory.py divergence POSITIONS TOPK``, so that what
a process had at its peak before does not disturb it; prints MiB.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from support.tiny_workers import PROMPT, RESPONSE, rollouts, with_loss_inputs, worker_config
from verl.config import FSDPConfig, HFModelConfig
from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.teacher_log_probs import LinearTeacher, TeacherLogProbs, score_tokens
from verl.single_controller.base import Worker
from verl.vocabulary import Vocabulary
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.row_layout import BatchSizes
from verl.workers.fsdp.build import build_model
from verl.workers.fsdp.optimizer import LearningRateSchedule, build_optimizer

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


def measure(*arguments: object) -> list[float]:
    """Run this file as a program; the numbers that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests")))}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def peak_mib() -> float:
    """Peak since the program started: ``VmHWM``. ``getrusage`` would include that of the parent when it forked."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux tells the peak of every process"
    return int(found[1]) / 1024


def score_and_train(folder: str, *sizes: str) -> None:
    """Peak after a batch of each number of rows, each row of full length."""
    Worker().init_process_group("gloo")
    config = worker_config(Path(folder), extend_start=TEACHER_IDS).actor
    mesh = init_device_mesh("cpu", (1,))
    module = build_model(folder, HFModelConfig(path=folder), FSDPConfig(), mesh, trainable=True)
    optimizer = build_optimizer(module, config.optim)
    actor = DataParallelPPOActor(
        config,
        module,
        optimizer,
        vocabulary=Vocabulary(module.num_rows, TEACHER_IDS),
        scoring_sizes=BatchSizes(16384, None),
        lr_schedule=LearningRateSchedule(optimizer, config.optim),
    )
    ids = [int(value) for value in torch.linspace(5, 150000, PROMPT + RESPONSE)]
    for rows in map(int, sizes):
        batch = with_loss_inputs(rollouts([(ids[:PROMPT], ids[PROMPT:])] * rows))
        actor.compute_token_stats(batch)
        actor.update_policy(batch)
        print(peak_mib())


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
    {"model": score_and_train, "divergence": diverge}[sys.argv[1]](*sys.argv[2:])

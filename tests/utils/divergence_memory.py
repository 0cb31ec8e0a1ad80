"""Prints by how many MiB the peak memory grows over an exact divergence at the real vocabulary size, with gradients.

Run as a program, ``divergence_memory.py POSITIONS``, so that what a process had at its peak before does not disturb it.
"""

import sys

import torch
from peak_memory import peak_kib

from verl.utils.linear_divergence import DivergenceOptions, linear_divergence
from verl.utils.teacher_log_probs import LinearTeacher

ROWS, TEACHER_IDS, HIDDEN = 176_384, 151_669, 8


def main(positions: int) -> None:
    torch.set_num_threads(1)
    hidden = torch.randn(positions, HIDDEN, requires_grad=True)
    weight = torch.randn(ROWS, HIDDEN, requires_grad=True)
    teacher = LinearTeacher(torch.randn(positions, HIDDEN), torch.randn(TEACHER_IDS, HIDDEN), TEACHER_IDS)
    weights = torch.full((positions,), 1 / positions)
    before = peak_kib()
    options = DivergenceOptions(leak_coef=1.0)
    loss, _ = linear_divergence(hidden, weight, weights, teacher, options, extend_start=TEACHER_IDS)
    loss.backward()
    print((peak_kib() - before) / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Prints by how many MiB the peak memory grows over an exact divergence at the real vocabulary size, with gradients.

Run as a program, ``divergence_memory.py POSITIONS TOPK``, so that what a process had at its peak before does not
disturb it. TOPK 0: from whole distributions of the teacher; else its likeliest ids are found first, measured as well.
"""

import sys

import torch

from support.peak_memory import peak_kib
from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
from verl.ops.teacher_log_probs import LinearTeacher, TeacherLogProbs, score_tokens
from verl.vocabulary import Vocabulary

ROWS, TEACHER_IDS, HIDDEN = 176_384, 151_669, 8


def main(positions: int, topk: int) -> None:
    torch.set_num_threads(1)
    hidden = torch.randn(positions, HIDDEN, requires_grad=True)
    weight = torch.randn(ROWS, HIDDEN, requires_grad=True)
    teacher = LinearTeacher(torch.randn(positions, HIDDEN), torch.randn(TEACHER_IDS, HIDDEN), TEACHER_IDS)
    weights = torch.full((positions,), 1 / positions)
    before = peak_kib()
    options = DivergenceOptions(leak_coef=1.0)
    compared: TeacherLogProbs = teacher
    if topk:
        top = score_tokens(teacher, torch.zeros(positions, dtype=torch.int64), -100.0, topk=topk).top
        assert top is not None, "asked for"
        compared = top.rows
    loss, _ = linear_divergence(hidden, weight, weights, compared, options, vocabulary=Vocabulary(ROWS, TEACHER_IDS))
    loss.backward()
    print((peak_kib() - before) / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

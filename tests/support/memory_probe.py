"""Prints the peak memory in KiB of scoring and training at the real vocabulary size, for ever more rows.

Run as a program, ``memory_probe.py MODEL ROWS ...``: what a process had at its peak before does not disturb it.
"""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh

from support.peak_memory import peak_kib
from support.tiny_workers import PROMPT, RESPONSE, rollouts, with_loss_inputs, worker_config
from verl.config import FSDPConfig, HFModelConfig
from verl.single_controller.base import Worker
from verl.vocabulary import Vocabulary
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.row_layout import BatchSizes
from verl.workers.fsdp.build import build_model
from verl.workers.fsdp.optimizer import LearningRateSchedule, build_optimizer

FIRST_EXTENDED = 151669


def main(folder: str, sizes: list[int]) -> None:
    """Score and train batches of these numbers of rows, each row of full length."""
    Worker().init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (1,))
    config = worker_config(folder, extend_start=FIRST_EXTENDED).actor
    module = build_model(folder, HFModelConfig(path=folder), FSDPConfig(), mesh, trainable=True)
    optimizer = build_optimizer(module, config.optim)
    actor = DataParallelPPOActor(
        config,
        module,
        optimizer,
        vocabulary=Vocabulary(module.num_rows, FIRST_EXTENDED),
        scoring_sizes=BatchSizes(16384, None),
        lr_schedule=LearningRateSchedule(optimizer, config.optim),
    )
    ids = [int(value) for value in torch.linspace(5, 150000, PROMPT + RESPONSE)]
    for rows in sizes:
        batch = with_loss_inputs(rollouts([(ids[:PROMPT], ids[PROMPT:])] * rows))
        actor.compute_token_stats(batch)
        actor.update_policy(batch)
        print(peak_kib())


if __name__ == "__main__":
    main(sys.argv[1], [int(rows) for rows in sys.argv[2:]])

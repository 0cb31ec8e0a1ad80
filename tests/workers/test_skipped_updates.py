"""An update that is not finite leaves weights and optimizer as they were, to the bit, on two ranks.

Three mini-batches, of which the second is poisoned in a row of the last rank, against the first and the third alone.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exact_cases import Models, workers
from support.tiny_workers import draw_rows, rollouts, run_ranks, whole, with_loss_inputs, worker_config

from verl.protocol import DataProto
from verl.weight_sync.send import named_weights
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

STEP_ROWS = 4
ANSWER = ([7, 8], [20, 21, 22, 23])
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "advantage": ({}, "advantages", float("nan")),
    # The gradient of log p - log q is finite wherever that of log p is: the loss alone tells.
    "loss alone": ({"use_kl_loss": True, "kl_loss_type": "kl"}, "ref_log_prob", float("-inf")),
}
"""Settings of the actor, and what is poisoned by what."""


def mini_batches(student_ids: int, key: str, poison: float) -> list[DataProto]:
    """Three of them; the last row of the second is poisoned at one trained token."""
    parts = []
    for seed in range(3):
        part = with_loss_inputs(rollouts([*draw_rows(STEP_ROWS - 1, student_ids, seed), ANSWER]), seed)
        parts.append(part.union(DataProto.from_dict({"ref_log_prob": part.tensor("old_log_probs") + 0.2})))
    parts[1].tensor(key)[-1, 2] = poison
    return parts


def state_of(worker: StudentWorker) -> dict[str, torch.Tensor]:
    """Weights, Adam's moments and its count of steps."""
    optimizer = worker._state.optimizer.state
    return {
        f"{name} {what}": whole(value)
        for name, weight in named_weights(worker._state.module).items()
        for what, value in {"weight": weight.detach(), **optimizer[weight]}.items()
    }


def rank_program(model: Path, student_ids: int, folder: Path) -> None:
    """Metrics and state with the poisoned mini-batch, and without it."""
    rank, seen = int(os.environ["RANK"]), {}
    for case, (actor, key, poison) in CASES.items():
        parts = mini_batches(student_ids, key, poison)
        for name, used in ((case, parts), (f"{case} left out", parts[::2])):
            worker = workers(worker_config(model, rows_per_step=STEP_ROWS, actor=actor))
            share = DataProto.concat([part.chunk(2)[rank] for part in used])
            seen[name] = worker.update_actor(share).meta_info["metrics"], state_of(worker)
    torch.save(seen, folder / f"seen_{rank}.pt")


def test_two_ranks_skip_what_one_of_them_cannot_take(models: Models, tmp_path: Path) -> None:
    run_ranks(2, rank_program, models.student, models.ids, tmp_path)
    ranks = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
    for case in CASES:
        for seen in ranks:
            (metrics, state), (without, expected) = seen[case], seen[f"{case} left out"]
            assert (metrics["actor/updates"], metrics["actor/skipped_updates"]) == (2, 1)
            assert (without["actor/updates"], without["actor/skipped_updates"]) == (2, 0)
            assert not torch.tensor(metrics["actor/loss"]).isfinite()
            assert bool(torch.tensor(metrics["actor/grad_norm"]).isfinite()) == (case == "loss alone")
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items())
        first, second = (str(seen[case][0]["actor/loss"]) for seen in ranks)
        assert first == second, "the same metric on both, though one of them has the poison"

"""An update that is not finite leaves weights and optimizer as they were, to the bit, on one rank and on two.

Three mini-batches, of which the second is poisoned in a row of the last rank, against the first and the third alone.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exact_cases import Models, workers
from support.tiny_workers import draw_rows, rollouts, run_ranks, whole, with_loss_inputs, worker_config

from verl.config import DistillConfig
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


def train_both(model: Path, student_ids: int, case: str, rank: int = 0, ranks: int = 1) -> list[Any]:
    """Metrics and state with the poisoned mini-batch, and without it."""
    actor, key, poison = CASES[case]
    first, second, third = mini_batches(student_ids, key, poison)
    seen = []
    for parts in ([first, second, third], [first, third]):
        worker = workers(worker_config(model, rows_per_step=STEP_ROWS, actor=actor))
        share = DataProto.concat([part.chunk(ranks)[rank] for part in parts])
        seen.append((worker.update_actor(share).meta_info["metrics"], state_of(worker)))
    return seen


def check(case: str, poisoned: tuple[Any, Any], without: tuple[Any, Any]) -> None:
    metrics, state = poisoned
    assert (metrics["actor/updates"], metrics["actor/skipped_updates"]) == (2, 1)
    assert (without[0]["actor/updates"], without[0]["actor/skipped_updates"]) == (2, 0)
    assert not torch.tensor(metrics["actor/loss"]).isfinite()
    assert bool(torch.tensor(metrics["actor/grad_norm"]).isfinite()) == (case == "loss alone")
    assert state.keys() == without[1].keys()
    for name, value in without[1].items():
        assert torch.equal(state[name], value), name
        assert not name.endswith("step") or value == 2


@pytest.mark.parametrize("case", CASES)
def test_a_poisoned_update_changes_nothing(case: str, models: Models) -> None:
    check(case, *train_both(models.student, models.ids, case))


def rank_program(model: Path, student_ids: int, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.save({case: train_both(model, student_ids, case, rank, 2) for case in CASES}, folder / f"seen_{rank}.pt")


def test_two_ranks_skip_what_one_of_them_cannot_take(models: Models, tmp_path: Path) -> None:
    run_ranks(2, rank_program, models.student, models.ids, tmp_path)
    seen = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
    for case in CASES:
        for rank in range(2):
            check(case, *seen[rank][case])
        first, second = (str(of_rank[case][0][0]["actor/loss"]) for of_rank in seen)
        assert first == second, "the same metric on both, though one of them has the poison"


def test_a_broken_teacher_or_student_trains_nothing(models: Models) -> None:
    """A weight that is no number: in the teacher of an exact objective, then in the student itself."""
    student = workers(models.config(rows_per_step=STEP_ROWS), DistillConfig("exact"))
    batch = with_loss_inputs(rollouts([*draw_rows(STEP_ROWS - 1, models.ids), ANSWER], models.extend_start))
    scores = []

    def update() -> tuple[float, float]:
        updated = student.update_actor(batch)
        scores.append(updated.tensor("ref_log_prob")[batch.tensor("response_mask").bool()])
        metrics = updated.meta_info["metrics"]
        return metrics["actor/updates"], metrics["actor/skipped_updates"]

    assert update() == (1, 0)
    teacher: Any = student.colocated_roles["ref"]
    norm = next(p for n, p in named_weights(teacher.model.module).items() if n.endswith("input_layernorm.weight"))
    kept, before = whole(norm), state_of(student)
    poison(norm, torch.full_like(kept, float("nan")))
    assert update() == (0, 1)
    assert all(torch.equal(value, before[name]) for name, value in state_of(student).items())
    poison(norm, kept)
    assert update() == (1, 0), "the teacher is as it was, and so is the student"
    weight = named_weights(student._state.module)["model.norm.weight"]
    poison(weight, torch.full_like(whole(weight), float("inf")))
    assert [update(), update()] == [(0, 1), (0, 1)]
    assert scores[1].isnan().all(), "the scores of a broken teacher are seen"
    assert all(torch.equal(values, scores[0]) for values in scores[2:]), "whatever became of the update"


@torch.no_grad()
def poison(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Write over the one rank's shard, as memory that went wrong would."""
    parameter.to_local().copy_(values)  # type: ignore[attr-defined]

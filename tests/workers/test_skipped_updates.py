"""An update that is not finite is as if it had never been: weights and optimizer to the bit, on one rank and on two.

Three mini-batches, of which the second is poisoned in a row of the last rank, against the first and the third alone.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exact_cases import workers
from support.tiny_workers import draw_rows, rollouts, run_ranks, whole, with_loss_inputs, worker_config

from verl.config import ActorRolloutRefConfig, DistillConfig
from verl.protocol import DataProto
from verl.weight_sync.send import named_weights
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")

STEP_ROWS = 4
ANSWER = ([7, 8], [20, 21, 22, 23])
KL = {"use_kl_loss": True, "kl_loss_type": "kl"}
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "advantage": ({}, "advantages", float("nan")),
    # The gradient of log p - log q is finite wherever that of log p is: the loss alone tells.
    "loss alone": (KL, "ref_log_prob", float("-inf")),
}
"""Settings of the actor, and what is poisoned by what."""


def mini_batches(student_ids: int, key: str, poison: float) -> list[DataProto]:
    """Three of them; the last row of the second is poisoned at one trained token."""
    parts = []
    for seed in range(3):
        rows = [*draw_rows(STEP_ROWS - 1, student_ids, seed), ANSWER]
        part = with_loss_inputs(rollouts(rows), seed)
        part.union(DataProto.from_dict({"ref_log_prob": part.tensor("old_log_probs") + 0.2}))
        parts.append(part)
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


def share(parts: list[DataProto], rank: int, ranks: int) -> DataProto:
    """A rank's rows of all mini-batches, in order."""
    return DataProto.concat([part.chunk(ranks)[rank] for part in parts])


def train(config: ActorRolloutRefConfig, parts: list[DataProto], rank: int, ranks: int) -> dict[str, Any]:
    worker = StudentWorker(config=config, device="cpu")
    worker.init_model()
    metrics = worker.update_actor(share(parts, rank, ranks)).meta_info["metrics"]
    return {"metrics": metrics, "state": state_of(worker)}


def both(config: ActorRolloutRefConfig, parts: list[DataProto], rank: int, ranks: int) -> list[dict[str, Any]]:
    """With the poisoned mini-batch, and without it."""
    return [train(config, parts, rank, ranks), train(config, [parts[0], parts[2]], rank, ranks)]


def check(poisoned: dict[str, Any], without: dict[str, Any], *, by_loss_alone: bool) -> None:
    metrics = poisoned["metrics"]
    assert (metrics["actor/updates"], metrics["actor/skipped_updates"]) == (2, 1)
    assert (without["metrics"]["actor/updates"], without["metrics"]["actor/skipped_updates"]) == (2, 0)
    assert not torch.tensor(metrics["actor/loss"]).isfinite()
    assert bool(torch.tensor(metrics["actor/grad_norm"]).isfinite()) == by_loss_alone
    assert poisoned["state"].keys() == without["state"].keys()
    for name, value in without["state"].items():
        assert torch.equal(poisoned["state"][name], value), name
        if name.endswith("step"):
            assert value == 2


def case_config(model: Path, actor: dict[str, Any]) -> ActorRolloutRefConfig:
    return worker_config(model, rows_per_step=STEP_ROWS, actor=actor)


@pytest.mark.parametrize("name", CASES)
def test_a_poisoned_update_never_was(name: str, student_model: Path, student_ids: int) -> None:
    actor, key, poison = CASES[name]
    parts = mini_batches(student_ids, key, poison)
    check(*both(case_config(student_model, actor), parts, 0, 1), by_loss_alone=name == "loss alone")


def rank_program(cases: dict[str, tuple[ActorRolloutRefConfig, list[DataProto]]], folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.save({name: both(*case, rank, 2) for name, case in cases.items()}, folder / f"seen_{rank}.pt")


def test_two_ranks_skip_what_one_of_them_cannot_take(student_model: Path, student_ids: int, tmp_path: Path) -> None:
    cases = {
        name: (case_config(student_model, actor), mini_batches(student_ids, key, poison))
        for name, (actor, key, poison) in CASES.items()
    }
    run_ranks(2, rank_program, cases, tmp_path)
    seen = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
    for name in CASES:
        for rank in range(2):
            check(*seen[rank][name], by_loss_alone=name == "loss alone")
        loss = [seen[rank][name][0]["metrics"].pop("actor/loss") for rank in range(2)]
        assert str(loss[0]) == str(loss[1]), "the same figure on both, though one of them has the poison"


def test_a_broken_teacher_or_student_trains_nothing(
    student_model: Path, teacher_model: Path, student_ids: int, extend_start: int
) -> None:
    """A weight that is no number: in the teacher of an exact objective, then in the student itself."""
    config = worker_config(student_model, teacher_model, extend_start=extend_start, rows_per_step=STEP_ROWS)
    student = workers(config, DistillConfig("exact"))
    teacher = student.colocated_roles["ref"]
    assert isinstance(teacher, TeacherWorker)
    batch = with_loss_inputs(rollouts([*draw_rows(STEP_ROWS - 1, student_ids), ANSWER], extend_start))

    said = []

    def update() -> tuple[float, float]:
        updated = student.update_actor(batch)
        said.append(updated.tensor("ref_log_prob")[batch.tensor("response_mask").bool()])
        metrics = updated.meta_info["metrics"]
        return metrics["actor/updates"], metrics["actor/skipped_updates"]

    assert update() == (1, 0)
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
    assert said[1].isnan().all(), "what a broken teacher says is seen"
    assert all(torch.equal(values, said[0]) for values in (*said[2:3], *said[3:])), "whatever became of the update"


@torch.no_grad()
def poison(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Write over the one rank's shard, as memory that went wrong would."""
    parameter.to_local().copy_(values)  # type: ignore[attr-defined]

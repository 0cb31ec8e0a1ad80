"""What the teachers of an exact objective say in an update is what they say when they are asked before it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exact_cases import LEAK, MISSING, mixed_batch, scored, teachers_of, workers
from support.tiny_workers import PROMPT, whole, worker_config

from verl.config import ActorRolloutRefConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.weight_sync.send import named_weights
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROWWISE = {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}


@pytest.fixture
def config(student_model: Path, teacher_model: Path, extend_start: int) -> Any:
    def of(packed: bool = True, rows_per_step: int = 8, **actor: Any) -> ActorRolloutRefConfig:
        return worker_config(
            student_model,
            teacher_model,
            extend_start=extend_start,
            rows_per_step=rows_per_step,
            actor={"ref_log_prob_replace_val": MISSING, **actor},
            ref={"ref_log_prob_replace_val": MISSING},
            model={"use_remove_padding": packed},
        )

    return of


def leaking(student_ids: int, extend_start: int, teachers: int) -> DataProto:
    """As `mixed_batch`, with an item token as the last that is trained in the rows of each teacher, but for one."""
    batch = mixed_batch(student_ids, extend_start, teachers)
    trained = batch.tensor("response_mask").sum(dim=-1)
    rows = trained[:-1].nonzero().flatten()
    for key, start in (("responses", 0), ("input_ids", PROMPT), ("distill_special_token_mask", 0)):
        value = 1 if key.endswith("mask") else extend_start + 2
        batch.tensor(key)[rows, start + trained[rows] - 1] = value
    assert set(batch.tensor("teacher")[rows].tolist()) == set(range(teachers))
    return batch


def weights(student: StudentWorker) -> dict[str, torch.Tensor]:
    return {name: whole(weight.detach()) for name, weight in named_weights(student._state.module).items()}


def assert_heard(student: StudentWorker, other: StudentWorker, distill: DistillConfig, batch: DataProto) -> None:
    """Train one on the bare batch and the other on one that was scored before."""
    bare = batch.select([key for key in batch.batch.keys() if key not in ("advantages", "old_log_probs")])  # noqa: SIM118
    updated = student.update_actor(batch if distill.has_policy_loss else bare)
    asked = scored(other.colocated_roles, distill, batch.select())
    right = other.update_actor(asked)
    expected = asked.tensor("ref_log_prob") * batch.tensor("response_mask")
    assert len(right) == 0, "they are not heard again"
    assert [*updated.batch.keys()] == ["ref_log_prob"]
    torch.testing.assert_close(updated.tensor("ref_log_prob"), expected, rtol=0, atol=1e-5)
    assert updated.meta_info == right.meta_info
    trained = weights(other)
    assert all(torch.equal(value, trained[name]) for name, value in weights(student).items())


@pytest.mark.parametrize("objective", ["exact", "forward_kl", "jsd"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("teachers", "support", "limits"),
    [
        (1, "shared", {}),
        (1, "full", ROWWISE),
        (3, "shared", {"ppo_max_token_len_per_gpu": 16}),
        (3, "full", {"rows_per_step": 4, "ppo_epochs": 2, **ROWWISE}),
        (2, "shared", {"rows_per_step": 2, "ppo_epochs": 3, "ppo_max_token_len_per_gpu": 24}),
    ],
)
def test_scores_and_update_are_those_of_a_stage_before(
    objective, packed, teachers, support, limits, config, frozen_model, student_ids, extend_start
) -> None:
    """Base, full and stitched teachers by row, each of which is asked of item tokens, known to it or not."""
    distill = DistillConfig(objective, support=support, teachers=teachers_of(teachers, frozen_model), **LEAK)
    batch = leaking(student_ids, extend_start, teachers)
    student, other = (workers(config(packed, **limits), distill) for _ in range(2))
    assert_heard(student, other, distill, batch)


def test_beside_a_task_reward(config, frozen_model, student_ids, extend_start) -> None:
    further = {"kept": TeacherConfig(path=str(frozen_model), sources=["rec_*"], weight=0.0)}
    distill = DistillConfig("exact", support="shared", teachers=further, coef=0.7, **LEAK)
    batch = leaking(student_ids, extend_start, 2)
    student, other = (workers(config(ppo_max_token_len_per_gpu=24), distill) for _ in range(2))
    assert_heard(student, other, distill, batch)


def test_a_mini_batch_that_trains_nothing_is_not_heard(config, student_ids, extend_start) -> None:
    distill, batch = DistillConfig("exact"), mixed_batch(student_ids, extend_start, 1)
    batch.tensor("response_mask")[:4] = 0
    said = workers(config(rows_per_step=4), distill).update_actor(batch).tensor("ref_log_prob")
    assert not said[:4].any() and (said != 0).equal(batch.tensor("response_mask").bool())


def test_a_policy_loss_needs_an_advantage(config, student_ids, extend_start) -> None:
    batch = mixed_batch(student_ids, extend_start, 1)
    batch.pop(["advantages"])
    workers(config(), DistillConfig("exact")).update_actor(batch)
    with pytest.raises(KeyError, match="advantages"):
        workers(config(), DistillConfig("exact", coef=0.5)).update_actor(batch)

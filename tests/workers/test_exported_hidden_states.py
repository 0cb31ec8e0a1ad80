"""Teachers on other ranks export hidden states: the update is that of teachers beside the student."""

import gc
import weakref

import pytest
import torch
from support.exact_cases import LEAK, Models, scored, workers, workers_apart
from support.tiny_workers import assert_same_gradient, first_gradient

from verl.config import DistillConfig, TeacherConfig
from verl.workers.actor.teachers import HIDDEN_STATE_HANDLES

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("objective", "teachers", "packed"), [("exact", 1, True), ("exact", 3, False), ("jsd", 3, False)]
)
def test_an_update_is_that_of_teachers_beside_the_student(
    objective: str, teachers: int, packed: bool, models: Models
) -> None:
    """Rows are scored in one order and layout, and trained in others."""
    distill, batch = models.distill(objective, teachers, support="shared", **LEAK), models.batch(teachers)

    def config(packed: bool, tokens: int):
        limits = {"actor": {"ppo_max_token_len_per_gpu": tokens}, "ref": {"log_prob_max_token_len_per_gpu": tokens}}
        return models.config(packed=packed, **limits)

    beside = workers(config(packed, 64), distill)
    updated = beside.update_actor(batch.select())
    right, trained = updated.meta_info["metrics"], batch.tensor("response_mask").bool()
    student, held = workers_apart(config(packed, 24), distill, config(not packed, 16))
    batch = scored(held, distill, batch, apart=True)
    difference = (batch.tensor("ref_log_prob") - updated.tensor("ref_log_prob"))[trained]
    assert difference.abs().max() < 1e-5
    batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    metrics = student.update_actor(batch).meta_info["metrics"]
    for name in ("actor/distill_loss", "actor/distill_divergence", "actor/leak_loss", "actor/grad_norm"):
        assert metrics[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), name
    assert_same_gradient(first_gradient(student), first_gradient(beside))


def test_only_trained_positions_are_exported_and_nothing_stays(models: Models) -> None:
    distill = models.distill(teachers=3)
    student, held = workers_apart(models.config(), distill)
    batch = models.batch(3)
    batch.tensor("response_mask")[4] = 0
    batch = scored(held, distill, batch, apart=True)
    handles, trained = batch.array(HIDDEN_STATE_HANDLES), batch.tensor("response_mask").sum(-1).tolist()
    assert [0 if handle is None else len(handle.value) for handle in handles] == trained and 0 in trained
    stitched = handles[[place == 2 for place in batch.tensor("teacher").tolist()]]
    assert {"hidden_0", "hidden_1"} <= {*stitched[0].value.batch.keys()}
    values = [weakref.ref(handle.value) for handle in handles if handle is not None]
    student.update_actor(batch)
    del handles, stitched
    batch.pop(non_tensor_batch_keys=[HIDDEN_STATE_HANDLES])
    gc.collect()
    assert [value() for value in values] == [None] * len(values)


def test_states_of_other_positions_are_noticed(models: Models) -> None:
    distill = models.distill()
    student, held = workers_apart(models.config(), distill)
    batch = scored(held, distill, models.batch(), apart=True)
    row, column = batch.tensor("response_mask").nonzero()[0].tolist()
    batch.tensor("response_mask")[row, column] = 0
    with pytest.raises(AssertionError, match="other positions"):
        student.update_actor(batch)


def test_a_head_that_two_teachers_share_is_exported_once(models: Models) -> None:
    further = {"self": TeacherConfig(), "mixed": TeacherConfig(vocabulary="stitched", sources=["mixed"])}
    student, held = workers_apart(models.config(), DistillConfig("exact", teachers=further))
    heads = {role: teacher.export_heads() for role, teacher in held.items()}
    assert heads["mixed"] == [heads["ref"][0], heads["self"][0]]
    assert student._teacher_heads["mixed"][1] is student._teacher_heads["self"][0]
    assert len(student._teacher_heads["ref"][0]) == models.extend_start, "rows past the shared ids stay where they are"

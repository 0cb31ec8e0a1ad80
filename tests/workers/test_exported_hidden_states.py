"""Teachers on other ranks lend hidden states: the update is that of teachers beside the student."""

import gc
import pickle
import weakref

import pytest
import torch
from support.exact_cases import LEAK, MISSING, mixed_batch, scored, teachers_of, workers, workers_apart
from support.tiny_workers import assert_same_gradient, first_gradient, worker_config

from verl.config import DistillConfig, TeacherConfig
from verl.single_controller.base.worker import InProcessObjectStore
from verl.workers.actor.teachers import HIDDEN_STATE_HANDLES

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("objective", ["exact", "forward_kl", "jsd"])
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_an_update_is_that_of_teachers_beside_the_student(
    objective, teachers, packed, student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    """Rows are scored in one order and layout, and trained in others."""
    distill = DistillConfig(objective, support="shared", teachers=teachers_of(teachers, frozen_model), **LEAK)
    batch = mixed_batch(student_ids, extend_start, teachers)

    def config(packed: bool, tokens: int):
        return worker_config(
            student_model,
            teacher_model,
            extend_start=extend_start,
            actor={"ref_log_prob_replace_val": MISSING, "ppo_max_token_len_per_gpu": tokens},
            ref={"ref_log_prob_replace_val": MISSING, "log_prob_max_token_len_per_gpu": tokens},
            model={"use_remove_padding": packed},
        )

    beside = workers(config(packed, 64), distill)
    right = beside.update_actor(batch.select()).meta_info["metrics"]
    student, held = workers_apart(config(packed, 24), distill, config(not packed, 16))
    lent = scored(held, distill, batch, apart=True)
    lent.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    metrics = student.update_actor(lent).meta_info["metrics"]
    for name in ("actor/distill_loss", "actor/distill_divergence", "actor/leak_loss", "actor/grad_norm"):
        assert metrics[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), name
    assert_same_gradient(first_gradient(student), first_gradient(beside))


def test_scores_are_those_of_a_teacher_that_lends_nothing(
    student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    distill = DistillConfig("exact", teachers=teachers_of(3, frozen_model))
    config, batch = worker_config(student_model, teacher_model, extend_start=extend_start), None
    batch = mixed_batch(student_ids, extend_start, 3)
    right = scored(workers(config, distill).colocated_roles, distill, mixed_batch(student_ids, extend_start, 3))
    lent = scored(workers_apart(config, distill)[1], distill, batch, apart=True)
    trained = batch.tensor("response_mask").bool()
    difference = (lent.tensor("ref_log_prob") - right.tensor("ref_log_prob"))[trained]
    assert difference.abs().max() < 1e-5 and HIDDEN_STATE_HANDLES not in right.non_tensor_batch


def test_only_trained_positions_are_lent_and_nothing_stays(
    student_model, teacher_model, frozen_model, student_ids, extend_start
) -> None:
    distill = DistillConfig("exact", teachers=teachers_of(3, frozen_model))
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    student, held = workers_apart(config, distill)
    batch = mixed_batch(student_ids, extend_start, 3)
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


@pytest.mark.parametrize("what", ["mask", "rows"])
def test_states_of_other_positions_are_noticed(what, student_model, teacher_model, student_ids, extend_start) -> None:
    distill = DistillConfig("exact")
    student, held = workers_apart(worker_config(student_model, teacher_model, extend_start=extend_start), distill)
    batch = scored(held, distill, mixed_batch(student_ids, extend_start, 1), apart=True)
    if what == "mask":
        row, column = batch.tensor("response_mask").nonzero()[0].tolist()
        batch.tensor("response_mask")[row, column] = 0
    else:
        lengths = batch.tensor("response_mask").sum(-1)
        first, second = next(
            (a, b) for a in range(len(lengths)) for b in range(a) if lengths[a] == lengths[b] and lengths[a] > 0
        )
        handles = batch.array(HIDDEN_STATE_HANDLES)
        handles[[first, second]] = handles[[second, first]]
    with pytest.raises(AssertionError, match="other positions" if what == "mask" else "of other rows"):
        student.update_actor(batch)


def test_a_head_that_two_teachers_share_is_lent_once(student_model, teacher_model, extend_start) -> None:
    distill = DistillConfig(
        "exact", teachers={"self": TeacherConfig(), "mixed": TeacherConfig(vocabulary="stitched", sources=["mixed"])}
    )
    student, held = workers_apart(worker_config(student_model, teacher_model, extend_start=extend_start), distill)
    heads = {role: teacher.export_heads() for role, teacher in held.items()}
    assert heads["mixed"] == [heads["ref"][0], heads["self"][0]]
    assert student._teacher_heads["mixed"][1] is student._teacher_heads["self"][0]
    assert len(student._teacher_heads["ref"][0]) == extend_start, "rows past the shared ids stay where they are"


def test_a_handle_of_this_process_does_not_leave_it() -> None:
    object_store = InProcessObjectStore()
    handle = object_store.put([1, 2])
    assert object_store.get([handle, handle]) == [[1, 2], [1, 2]]
    with pytest.raises(TypeError, match="put into the store of one process"):
        pickle.dumps(handle)

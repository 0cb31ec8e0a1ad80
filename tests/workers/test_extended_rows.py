"""Frozen extended rows do not move by a bit, the rest trains as if they had no gradient; and drift in numbers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_workers import (
    ADAM_BETA1,
    draw_rows,
    first_gradient,
    load_plain,
    rollouts,
    run_ranks,
    whole,
    with_loss_inputs,
    worker_config,
    write_model,
)

from verl.config import ActorRolloutRefConfig, DistillConfig, OptimizerConfig
from verl.protocol import DataProto
from verl.weight_sync.send import named_weights
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS, STEPS = 8, 3
DECAYING = OptimizerConfig(lr=1e-2, weight_decay=0.5, betas=(ADAM_BETA1, 0.999))
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
EXACT = DistillConfig("exact", support="shared", leak_coef=1.0)


@pytest.fixture(scope="module")
def untied_model(tiny_tokenizers, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("untied"), tiny_tokenizers[1], tied=False)


def student_of(config: ActorRolloutRefConfig, distill: DistillConfig | None = None) -> StudentWorker:
    student = StudentWorker(config, "cpu", distill)
    student.init_model()
    if distill is not None:
        teacher = TeacherWorker(config, "cpu")
        teacher.init_model()
        student.colocated_roles = {"actor": student, "ref": teacher}
    return student


def weights_of(student: StudentWorker) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in named_weights(student._state.module).items()}


def moments_of(student: StudentWorker) -> dict[str, torch.Tensor]:
    state = student._state
    named = named_weights(state.module).items()
    return {
        f"{moment} {name}": whole(state.optimizer.state[parameter][moment])
        for name, parameter in named
        for moment in ("exp_avg", "exp_avg_sq")
    }


def assert_extended_rows_untouched(student: StudentWorker, model: Path, start: int) -> None:
    """They are those of the files, their moments are zero, and the rest has moved."""
    files, weights, moments = dict(load_plain(model).named_parameters()), weights_of(student), moments_of(student)
    matrices = [name for name in MATRICES if name in weights]
    assert matrices == list(MATRICES if "lm_head.weight" in files else MATRICES[:1])
    for name in matrices:
        assert torch.equal(weights[name][start:], files[name][start:])
        assert not torch.equal(weights[name][:start], files[name][:start])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not moments[f"{moment} {name}"][start:].any() and moments[f"{moment} {name}"][:start].any()


@pytest.mark.parametrize("distill", [None, EXACT])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_rows_do_not_move(
    tied, distill, student_model, untied_model, teacher_model, student_ids, extend_start
) -> None:
    model = student_model if tied else untied_model
    batch = with_loss_inputs(rollouts(draw_rows(ROWS, student_ids, seed=2), extend_start))
    assert (batch.tensor("input_ids") >= extend_start).any()
    actor = {"freeze_extended_rows": True, "optim": DECAYING, "grad_clip": 0.5}
    student = student_of(worker_config(model, teacher_model, extend_start=extend_start, actor=actor), distill)
    for _ in range(STEPS):
        metrics = student.update_actor(batch).meta_info["metrics"]
    assert metrics["actor/grad_norm"] > 0 and metrics["actor/skipped_updates"] == 0
    assert metrics["actor/extended_row_drift"] == 0.0 and metrics["actor/shared_row_drift"] > 0
    assert_extended_rows_untouched(student, model, extend_start)


@pytest.mark.parametrize("tied", [True, False])
def test_their_gradient_is_in_neither_the_norm_nor_the_step(
    tied, student_model, untied_model, student_ids, extend_start
) -> None:
    model = student_model if tied else untied_model
    batch = with_loss_inputs(rollouts(draw_rows(ROWS, student_ids), extend_start))
    free = student_of(worker_config(model, extend_start=extend_start, actor={"optim": DECAYING}))
    free_metrics = free.update_actor(batch).meta_info["metrics"]
    gradient = first_gradient(free)
    for name in MATRICES:
        if name in gradient:
            assert gradient[name][extend_start:].any()
            gradient[name][extend_start:] = 0
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    assert float(norm) < 0.998 * free_metrics["actor/grad_norm"], "else this test proves nothing"

    clip = 0.5 * float(norm)
    actor = {"freeze_extended_rows": True, "optim": DECAYING, "grad_clip": clip}
    frozen = student_of(worker_config(model, extend_start=extend_start, actor=actor))
    assert frozen.update_actor(batch).meta_info["metrics"]["actor/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, value in first_gradient(frozen).items():
        torch.testing.assert_close(value, 0.5 * gradient[name], rtol=1e-4, atol=1e-7)


def test_other_rows_train_as_where_extended_ones_have_no_gradient(
    student_model, teacher_model, student_ids, extend_start
) -> None:
    """Shared support, no leak term and no item token in the rows: the extended rows have no gradient anyway."""
    batch = with_loss_inputs(rollouts(draw_rows(ROWS, extend_start, seed=3), extend_start))
    distill = DistillConfig("exact", support="shared")
    ends, drifts = [], []
    for frozen in (False, True):
        actor = {"freeze_extended_rows": frozen, "optim": DECAYING, "grad_clip": 0.5}
        student = student_of(
            worker_config(student_model, teacher_model, extend_start=extend_start, actor=actor), distill
        )
        for _ in range(STEPS):
            metrics = student.update_actor(batch).meta_info["metrics"]
        ends.append((weights_of(student), metrics["actor/grad_norm"]))
        drifts.append(metrics["actor/extended_row_drift"])
    (free, free_norm), (frozen_weights, frozen_norm) = ends
    assert free_norm == frozen_norm
    for name, value in free.items():
        shared = slice(None, extend_start if name in MATRICES else None)
        assert torch.equal(value[shared], frozen_weights[name][shared]), name
    # What moves the free rows is weight decay alone: by the factor 1 - lr x decay in each step.
    assert drifts == [pytest.approx(1 - (1 - 1e-2 * 0.5) ** STEPS, rel=1e-3), 0.0]


def expected_drift(student: StudentWorker, model: Path, start: int) -> dict[str, float]:
    """By hand, from whole matrices."""
    files, weights = dict(load_plain(model).named_parameters()), weights_of(student)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for name in MATRICES:
        if name in weights:
            now, before = weights[name].double(), files[name].detach().double()
            for part, rows in enumerate((slice(start, None), slice(None, start))):
                sums[part] += torch.stack([(now - before)[rows].square().sum(), before[rows].square().sum()])
    extended, shared = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    return {"actor/extended_row_drift": extended, "actor/shared_row_drift": shared}


def test_drift_of_a_resumed_run_is_since_its_first_start(untied_model, student_ids, extend_start, tmp_path) -> None:
    batch = with_loss_inputs(rollouts(draw_rows(ROWS, student_ids), extend_start))
    config = worker_config(untied_model, extend_start=extend_start, actor={"optim": DECAYING})
    student = student_of(config)
    first = student.update_actor(batch).meta_info["metrics"]
    student.save_checkpoint(str(tmp_path), 1)
    second = student.update_actor(batch).meta_info["metrics"]
    resumed = student_of(config)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.update_actor(batch).meta_info["metrics"] == pytest.approx(second, rel=1e-5, abs=1e-6)
    assert second["actor/extended_row_drift"] > first["actor/extended_row_drift"] > 0
    expected = expected_drift(student, untied_model, extend_start)
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_without_an_extension_there_is_none_to_measure(student_model, student_ids) -> None:
    batch = with_loss_inputs(rollouts(draw_rows(ROWS, student_ids)))
    metrics = student_of(worker_config(student_model)).update_actor(batch).meta_info["metrics"]
    assert not [name for name in metrics if "drift" in name]


def test_an_extension_beyond_the_model_is_an_error(student_model) -> None:
    student = student_of(worker_config(student_model))
    rows = len(load_plain(student_model).get_input_embeddings().weight)
    with pytest.raises(ValueError, match=f"extend_vocab_start_token={rows} leaves no extended row"):
        ExtendedRows(student._state.module, rows)


def rank_program(cases: list[tuple[ActorRolloutRefConfig, Path, DataProto, Path]]) -> None:
    """Train on this rank's share, and leave what can be seen."""
    rank = int(os.environ["RANK"])
    for config, model, batch, out in cases:
        student, start = student_of(config), config.rollout.extend_start
        assert start is not None
        shares = [matrix.first for matrix in student.actor.extended_rows._matrices]
        for _ in range(STEPS):
            metrics = student.update_actor(batch.chunk(2)[rank]).meta_info["metrics"]
        seen: dict[str, Any] = {"weights": weights_of(student), "metrics": metrics, "first": shares}
        seen["expected"] = expected_drift(student, model, start)
        if config.actor.freeze_extended_rows:
            assert_extended_rows_untouched(student, model, start)
        torch.save(seen, out / f"seen_{rank}.pt")


def test_two_ranks_do_what_one_does(tiny_tokenizers, student_ids, extend_start, tmp_path) -> None:
    """An odd number of rows; extended ones on the second rank alone, and on both."""
    cases = []
    for number, (tied, start, frozen) in enumerate(
        [(True, extend_start, True), (False, 100, True), (False, extend_start, False)]
    ):
        folder = tmp_path / str(number)
        model = write_model(folder / "model", tiny_tokenizers[1], tied=tied, rows=student_ids + 6)
        actor = {"freeze_extended_rows": frozen, "optim": DECAYING, "grad_clip": 0.5}
        batch = with_loss_inputs(rollouts(draw_rows(ROWS, student_ids), start))
        cases.append((worker_config(model, extend_start=start, actor=actor), model, batch, folder))
    run_ranks(2, rank_program, cases)
    rows = student_ids + 6
    for config, _, batch, folder in cases:
        two = [torch.load(folder / f"seen_{rank}.pt") for rank in range(2)]
        start, half = config.rollout.extend_start, -(-rows // 2)
        firsts = [[min(start, half)], [max(start - half, 0)]]
        assert [seen["first"] for seen in two] == [first * len(two[0]["first"]) for first in firsts]
        one = student_of(config)
        for _ in range(STEPS):
            metrics = one.update_actor(batch).meta_info["metrics"]
        assert two[0]["metrics"] == two[1]["metrics"] == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        assert {name: two[0]["metrics"][name] for name in two[0]["expected"]} == pytest.approx(two[0]["expected"])
        for name, value in weights_of(one).items():
            torch.testing.assert_close(two[1]["weights"][name], value, rtol=0, atol=2e-4)

"""Frozen extended rows do not move by a bit, the rest trains as if they had no gradient; and drift in numbers."""

import os
from pathlib import Path

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import Models, workers

from verl.config import ActorRolloutRefConfig, OptimizerConfig
from verl.protocol import DataProto
from verl.weight_sync import named_weights
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS, STEPS = 8, 3
DECAYING = {"optim": OptimizerConfig(lr=1e-2, weight_decay=0.5, betas=(tiny.ADAM_BETA1, 0.999))}
FROZEN = {"freeze_extended_rows": True, "grad_clip": 0.5, **DECAYING}
DRIFT = ("actor/extended_row_drift", "actor/shared_row_drift")
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def batch_of(vocabulary: int, start: int, seed: int = 0) -> DataProto:
    return tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(ROWS, vocabulary, seed), start))


def train(student: StudentWorker, batch: DataProto, steps: int = STEPS) -> dict[str, float]:
    """Metrics of the last step."""
    return [student.update_actor(batch).meta_info["metrics"] for _ in range(steps)][-1]


def assert_extended_rows_untouched(student: StudentWorker, model: Path, start: int) -> None:
    """They are those of the files, their moments are zero, and the rest has moved."""
    files, weights = dict(tiny.load_plain(model).named_parameters()), tiny.weights_of(student)
    matrices = {name: p for name, p in named_weights(student._state.module).items() if name in MATRICES}
    assert len(matrices) == (2 if "lm_head.weight" in files else 1)
    for name, parameter in matrices.items():
        assert torch.equal(weights[name][start:], files[name][start:])
        assert not torch.equal(weights[name][:start], files[name][:start])
        for moment in ("exp_avg", "exp_avg_sq"):
            values = tiny.whole(student._state.optimizer.state[parameter][moment])
            assert not values[start:].any() and values[:start].any()


@pytest.mark.parametrize("tied", [True, False])
def test_their_gradient_is_in_neither_the_norm_nor_the_step(tied: bool, models: Models) -> None:
    folder, batch = models.student if tied else models.untied, batch_of(models.ids, models.extend_start)
    free = workers(models.config(folder, actor=DECAYING))
    free_metrics, gradient = train(free, batch, 1), tiny.first_gradient(free)
    for name in MATRICES:
        if name in gradient:
            assert gradient[name][models.extend_start :].any()
            gradient[name][models.extend_start :] = 0
    norm = float(torch.stack([value.norm() for value in gradient.values()]).norm())
    assert norm < 0.998 * free_metrics["actor/grad_norm"], "else this test proves nothing"
    frozen = workers(models.config(folder, actor={**FROZEN, "grad_clip": 0.5 * norm}))
    assert train(frozen, batch, 1)["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, value in tiny.first_gradient(frozen).items():
        torch.testing.assert_close(value, 0.5 * gradient[name], rtol=1e-4, atol=1e-7)


def expected_drift(student: StudentWorker, model: Path, start: int) -> dict[str, float]:
    """By hand, from whole matrices."""
    files, weights = dict(tiny.load_plain(model).named_parameters()), tiny.weights_of(student)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for name in MATRICES:
        if name in weights:
            now, before = weights[name].double(), files[name].detach().double()
            for part, rows in enumerate((slice(start, None), slice(None, start))):
                sums[part] += torch.stack([(now - before)[rows].square().sum(), before[rows].square().sum()])
    return dict(zip(DRIFT, (sums[:, 0] / sums[:, 1]).sqrt().tolist(), strict=True))


def test_drift_of_a_resumed_run_is_since_its_first_start(models: Models, tmp_path: Path) -> None:
    batch, config = batch_of(models.ids, models.extend_start), models.config(models.untied, actor=DECAYING)
    student = workers(config)
    first = train(student, batch, 1)
    tiny.save_checkpoint(student, tmp_path)
    second = train(student, batch, 1)
    resumed = workers(config)
    resumed.load_checkpoint(str(tmp_path))
    assert train(resumed, batch, 1) == pytest.approx(second, rel=1e-5, abs=1e-6)
    assert second["actor/extended_row_drift"] > first["actor/extended_row_drift"] > 0
    assert second | expected_drift(student, models.untied, models.extend_start) == pytest.approx(second, rel=1e-5)


def rank_program(cases: list[tuple[ActorRolloutRefConfig, Path, DataProto, Path]]) -> None:
    """Train on this rank's share, and write what can be seen."""
    rank = int(os.environ["RANK"])
    for config, model, batch, folder in cases:
        student = workers(config)
        metrics, start = train(student, batch.chunk(2)[rank]), config.rollout.extend_start
        if config.actor.freeze_extended_rows:
            assert_extended_rows_untouched(student, model, start)
        assert {name: metrics[name] for name in DRIFT} == pytest.approx(expected_drift(student, model, start))
        torch.save((metrics, tiny.weights_of(student)), folder / f"seen_{rank}.pt")


def test_two_ranks_do_what_one_does(tiny_tokenizers, models: Models, tmp_path: Path) -> None:
    """An odd number of rows; extended ones on the second rank alone, and on both."""
    cases = []
    for tied, start, frozen in [(True, models.extend_start, True), (False, 100, True), (False, 101, False)]:
        model = tiny.write_model(tmp_path / str(start), tiny_tokenizers[1], tied=tied, rows=models.ids + 6)
        config = tiny.worker_config(model, extend_start=start, actor={**FROZEN, "freeze_extended_rows": frozen})
        cases.append((config, model, batch_of(models.ids, start), model))
    tiny.run_ranks(2, rank_program, cases)
    for config, _, batch, folder in cases:
        (first, _), (second, weights) = (torch.load(folder / f"seen_{rank}.pt") for rank in range(2))
        one = workers(config)
        assert first == second == pytest.approx(train(one, batch), rel=1e-3, abs=1e-5)
        for name, value in tiny.weights_of(one).items():
            # Adam makes the rounding of a tiny gradient a part of its step of 1e-3.
            torch.testing.assert_close(weights[name], value, rtol=0, atol=5e-4)
    with pytest.raises(ValueError, match=f"extend_vocab_start_token={models.ids + 5} leaves no extended row"):
        workers(tiny.worker_config(models.student, extend_start=models.ids + 5))

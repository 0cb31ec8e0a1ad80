"""What ends a run, what is only warned of, and what neither: on metrics written by hand and teachers that are fakes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving_ranks import DRIVER_STATE, FakeRanks

from verl.config import PPOConfig, TeacherConfig, TrainerConfig
from verl.protocol import DataProto
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.saver import CheckpointSaver
from verl.trainer.ppo.guards import EngineGap, GuardError, SkippedUpdates, TeacherProbe
from verl.workers.actor.dp_actor import SCORED_KEYS


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    return PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder), save_freq=1, **trainer))


def make_saver(config: PPOConfig) -> CheckpointSaver:
    return CheckpointSaver(config, {}, BestCheckpoint(config.trainer, None))


# ------------------------------------------------------------------ skipped updates


class Updates:
    """Updates of a run, step after step."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        config = make_config(folder, max_skipped_updates=limit)
        self.saver = make_saver(config)
        self.guard = SkippedUpdates(config, self.saver)
        self.step = 0

    def take(self, taken: int, skipped: int) -> None:
        self.step += 1
        loss = math.nan if skipped else 0.25
        counts = {"actor/updates": float(taken), "actor/skipped_updates": float(skipped)}
        self.guard.check({**counts, "actor/loss": loss, "actor/lr": 1e-3, "distill/reverse_kl": loss}, self.step)


@pytest.mark.parametrize("limit", [0, 3])
def test_a_run_that_takes_no_update_ends_beyond_the_limit(tmp_path: Path, limit: int) -> None:
    run = Updates(tmp_path, limit)
    for _ in range(limit):
        run.take(0, 1)
    total = rf"2 of the 2 updates of step .* \(actor/loss=nan\); {limit + 2} of this run so far"
    with pytest.raises(GuardError, match=rf"{total}, .* trainer\.max_skipped_updates={limit} allows"):
        run.take(0, 2)


def test_ten_updates_make_up_for_one_that_is_skipped(tmp_path: Path) -> None:
    """One in eleven goes on for ever, one in ten does not: a tenth of a skip more is missing each time."""
    run = Updates(tmp_path, 2)
    for _ in range(1000):
        run.take(0, 1)
        run.take(10, 0)
    skips = 0
    with pytest.raises(GuardError, match=r"trainer\.max_skipped_updates=2"):
        while skips < 100:
            skips += 1
            run.take(0, 1)
            run.take(9, 0)
    # Tenths missing at the k-th: 10 + (k - 1); more than 20 end the run.
    assert skips == 12


def test_a_checkpoint_that_fails_meanwhile_does_not_hide_the_cause(tmp_path: Path) -> None:
    run, ranks = Updates(tmp_path, 0), FakeRanks()
    ranks.slow, ranks.error = True, "no space"
    run.saver.save(ranks, 1, DRIVER_STATE, last=False)
    with pytest.raises(GuardError, match=r"^1 of the 1 updates"):
        run.take(0, 1)


def test_without_a_limit_or_without_counts_the_run_goes_on(tmp_path: Path, caplog: Any) -> None:
    run = Updates(tmp_path, None)
    for _ in range(100):
        run.take(0, 1)
    warned = [int(record.getMessage().split(" of this run")[0].split()[-1]) for record in caplog.records]
    assert warned == [1, 2, 4, 8, 16, 32, 64], "seldom enough for a run of a million steps"
    Updates(tmp_path, 0).guard.check({"actor/loss": math.nan}, 1)  # steps without counts are not checked


# ------------------------------------------------------------------ the engine


def gaps(guard: EngineGap, *values: float) -> list[dict[str, float]]:
    return [guard.check({"training/rollout_log_probs_diff_mean": v}, step) for step, v in enumerate(values, 1)]


def test_a_gap_above_the_bound_is_counted_and_warned_of(tmp_path: Path, caplog: Any) -> None:
    metrics = gaps(EngineGap(make_config(tmp_path, engine_gap_bound=0.1)), 0.02, 0.1, 0.15, math.nan, 0.05)
    assert [step["distill/engine_gap"] for step in metrics[:3]] == [0.02, 0.1, 0.15]
    exceeded = [step["distill/engine_gap_exceeded"] for step in metrics]
    assert exceeded == [0, 0, 1, 1, 0], "the bound itself is within it, NaN beyond"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 3", "step 4"]
    assert "0.15 nats on average, above trainer.engine_gap_bound=0.1" in caplog.text


def test_a_gap_is_warned_of_again_where_it_has_doubled(tmp_path: Path, caplog: Any) -> None:
    guard = EngineGap(make_config(tmp_path, engine_gap_bound=0.1))
    metrics = gaps(guard, 0.2, 0.3, 0.4, 0.2, 0.7, 0.8, math.nan, math.nan, 3.0)
    assert all(step["distill/engine_gap_exceeded"] for step in metrics)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 1", "step 3", "step 6", "step 7"]


def test_gaps_that_are_no_fault(tmp_path: Path, caplog: Any) -> None:
    assert gaps(EngineGap(make_config(tmp_path, engine_gap_bound=None)), 5.0) == [{"distill/engine_gap": 5.0}]
    config = make_config(tmp_path)
    assert EngineGap(config).check({"actor/loss": 1.0}, 1) == {}
    for top_p, top_k in ((0.95, -1), (1.0, 200)):
        config.actor_rollout_ref.rollout.top_p, config.actor_rollout_ref.rollout.top_k = top_p, top_k
        assert gaps(EngineGap(config), 5.0) == [{}]
    assert not caplog.records


# ------------------------------------------------------------------ teachers

RIGHT = {"distill/teacher_canary": 0}


class Teacher:
    """Scores a token by its id, plus an error in one row at one place, or at all item tokens."""

    def __init__(self) -> None:
        self.error, self.row, self.item_error = 0.0, 0, 0.0
        self.batches: list[DataProto] = []

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        self.batches.append(data)
        scores = -0.1 * data.tensor("responses").float()
        scores[self.row, 2] += self.error
        scores += self.item_error * (data.tensor("responses") >= 50)
        return DataProto.from_dict({"ref_log_prob": scores})


def make_probe(
    folder: Path, further: dict[str, str] | None = None, length: int = 512, ema: float | None = None, **trainer: Any
) -> TeacherProbe:
    """A probe of 50 shared ids and 10 item tokens. ``further``: vocabularies of further teachers by name."""
    config = make_config(folder, **{"canary_tolerance": 0.5, **trainer})
    rollout = config.actor_rollout_ref.rollout
    rollout.extend_vocab_start_token, rollout.temperature = 50, 0.7
    rollout.prompt_length = rollout.response_length = length
    config.actor_rollout_ref.ref.model.path = "a teacher that lacks the item tokens"
    config.algorithm.distill.teachers = {
        name: TeacherConfig(vocabulary=v, ema=ema) for name, v in (further or {}).items()
    }
    return TeacherProbe(config, 60, make_saver(config))


def test_every_rank_scores_the_same_row_spread_over_the_shared_ids(tmp_path: Path) -> None:
    teacher = Teacher()
    make_probe(tmp_path, n_gpus_per_node=2, teacher_nnodes=1, teacher_n_gpus_per_node=3).check({"ref": teacher}, 0)
    (batch,) = teacher.batches
    assert set(batch.batch.keys()) == set(SCORED_KEYS)
    assert batch.meta_info == {"temperature": 0.7}
    rows = batch.tensor("input_ids")
    assert rows.shape == (3, 128) and (rows == rows[0]).all() and set(rows[0].tolist()) == set(range(50))
    assert rows[0, :6].tolist() == [0, 30, 11, 42, 23, 4]
    assert torch.equal(batch.tensor("responses"), rows[:, 1:])
    assert batch.tensor("attention_mask").all()
    make_probe(tmp_path, length=5).check({"ref": teacher}, 0)
    assert teacher.batches[1].tensor("input_ids").shape == (1, 10), "no longer than a training row"


def test_teachers_that_know_item_tokens_score_some_and_the_others_none(tmp_path: Path) -> None:
    vocabularies = {"self": "full", "mixed": "stitched", "small": "base"}
    teachers = {role: Teacher() for role in ("ref", *vocabularies)}
    make_probe(tmp_path, vocabularies).check(teachers, 0)
    for role, teacher in teachers.items():
        (batch,) = teacher.batches
        responses = batch.tensor("responses")
        largest = 49 if role in ("ref", "small") else 59
        assert int(responses.max()) == largest, f"{role}: spread over all that it knows"


def test_the_largest_difference_is_measured_per_teacher_from_the_start(tmp_path: Path) -> None:
    probe, lacking, kept = make_probe(tmp_path, {"kept": "full"}), Teacher(), Teacher()
    lacking.error = -math.inf  # of an id that it lacks
    teachers = {"ref": lacking, "kept": kept}
    assert probe.check(teachers, 0) == RIGHT | {"distill_teacher/kept/teacher_canary": 0}
    kept.error = -0.25
    for step in (10, 20):  # not from the last time
        assert probe.check(teachers, step) == RIGHT | {"distill_teacher/kept/teacher_canary": pytest.approx(0.25)}


@pytest.mark.parametrize("error", [0.6, math.nan, -math.inf])
def test_a_teacher_that_went_wrong_ends_the_run(tmp_path: Path, error: float) -> None:
    probe, kept = make_probe(tmp_path, {"kept": "full"}), Teacher()
    probe.check({"ref": Teacher(), "kept": kept}, 0)
    kept.error = error
    text = (
        rf"teacher 'kept' at step 20 .* up to {abs(error):.4g} nats on some rank, above trainer\.canary_tolerance=0\.5"
    )
    with pytest.raises(GuardError, match=text):
        probe.check({"ref": Teacher(), "kept": kept}, 20)


def test_a_fault_in_item_rows_or_in_one_rank_alone_is_found(tmp_path: Path) -> None:
    probe, teacher = make_probe(tmp_path, {"self": "full"}), Teacher()
    probe.check({"self": teacher}, 0)
    teacher.item_error = -0.7
    with pytest.raises(GuardError, match=r"teacher 'self' at step 10 .* by up to 0\.7 nats"):
        probe.check({"self": teacher}, 10)
    other = Teacher()
    other.error, other.row = 1.0, 1
    with pytest.raises(GuardError, match=r"teacher 'ref' at step 0 .* by up to 1 nats on some rank"):
        make_probe(tmp_path, n_gpus_per_node=2).check({"ref": other}, 0)


def resumed(folder: Path, drift: float, **probe: Any) -> dict[str, float]:
    """What a resumed run finds whose teacher scores otherwise by ``drift`` than in the run before it."""
    first, teacher = make_probe(folder), Teacher()
    first.check({"ref": teacher}, 0)
    teacher.error = drift
    second = make_probe(folder, **probe)
    second.load_state_dict(first.state_dict())
    return second.check({"ref": teacher}, 30)


def test_a_resumed_run_is_compared_with_the_first_start(tmp_path: Path) -> None:
    assert resumed(tmp_path, 0.4) == {"distill/teacher_canary": pytest.approx(0.4)}
    with pytest.raises(GuardError, match=r"teacher 'ref' at step 30 .*: the 127 log-probs .* 0\.6 nats"):
        resumed(tmp_path, 0.6)
    assert resumed(tmp_path, 3.0, resume_allow_changed=["teacher"]) == RIGHT
    with pytest.raises(GuardError, match="teacher 'ref'"):  # what is allowed has nothing to do with teachers
        resumed(tmp_path, 3.0, resume_allow_changed=["data.train_files", "actor_rollout_ref.rollout.val_kwargs"])


def test_a_teacher_that_scored_other_tokens_starts_over_alone(tmp_path: Path, caplog: Any) -> None:
    first, ref, own = make_probe(tmp_path, {"self": "base"}), Teacher(), Teacher()
    first.check({"ref": ref, "self": own}, 0)
    own.error = 3.0
    second = make_probe(tmp_path, {"self": "full"})
    second.load_state_dict(first.state_dict())
    assert "teacher 'self' is not compared with the run's first start" in caplog.text and "'ref'" not in caplog.text
    assert second.check({"ref": ref, "self": own}, 40) == RIGHT | {"distill_teacher/self/teacher_canary": 0}
    ref.error = 0.6
    with pytest.raises(GuardError, match=r"teacher 'ref' at step 50 scores otherwise"):
        second.check({"ref": ref, "self": own}, 50)


def test_a_teacher_that_follows_the_student_is_not_probed(tmp_path: Path) -> None:
    probe, moving = make_probe(tmp_path, {"slow": "full"}, ema=0.5), Teacher()
    for step in (0, 1):
        assert probe.check({"ref": Teacher(), "slow": moving}, step) == RIGHT
    assert not moving.batches and list(probe.state_dict()) == ["ref"]


def test_without_a_tolerance_no_teacher_scores(tmp_path: Path) -> None:
    probe, teacher = make_probe(tmp_path, canary_tolerance=None), Teacher()
    assert probe.check({"ref": teacher}, 0) == {} and probe.state_dict() == {} and not teacher.batches

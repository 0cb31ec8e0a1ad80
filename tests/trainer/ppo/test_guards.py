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


@pytest.mark.parametrize("name", ["max_skipped_updates", "canary_tolerance", "engine_gap_bound"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_limits_below_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{name}={value} must be (at least 0|a whole number), or null"):
        TrainerConfig(**{name: value})


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


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_run_that_takes_no_update_ends_beyond_the_limit(tmp_path: Path, limit: int) -> None:
    run = Updates(tmp_path, limit)
    for _ in range(limit):
        run.take(0, 1)
    total = f"2 of the 2 updates of step .*; {limit + 2} of this run so far"
    with pytest.raises(GuardError, match=rf"{total}, .* trainer\.max_skipped_updates={limit} allows"):
        run.take(0, 2)


def test_ten_updates_make_up_for_one_that_is_skipped(tmp_path: Path) -> None:
    """One in eleven goes on for ever, one in ten does not: a tenth of a skip more is missing each time."""
    run = Updates(tmp_path, 2)
    for _ in range(1000):
        run.take(0, 1)
        run.take(10, 0)
    skips = 0
    with pytest.raises(GuardError):
        while skips < 100:
            skips += 1
            run.take(0, 1)
            run.take(9, 0)
    # Tenths missing at the k-th: 10 + (k - 1); more than 20 end the run.
    assert skips == 12


def test_the_error_names_step_metrics_and_the_checkpoint_that_was_being_written(tmp_path: Path) -> None:
    run, ranks = Updates(tmp_path, 0), FakeRanks()
    ranks.slow = True
    run.take(1, 0)
    run.saver.save(ranks, 1, DRIVER_STATE, last=False)
    assert not (tmp_path / "global_step_1").exists()
    with pytest.raises(GuardError) as stop:
        run.take(0, 1)
    text = str(stop.value)
    assert text.startswith("1 of the 1 updates of step 2 had a loss or gradient that is not finite")
    assert "(actor/loss=nan)" in text and "step 1 took one" in text
    assert text.endswith(f"{tmp_path / 'global_step_1'} is whole and safe")


def test_a_checkpoint_that_fails_at_the_end_does_not_hide_the_cause(tmp_path: Path) -> None:
    run, ranks = Updates(tmp_path, 0), FakeRanks()
    ranks.error = "no space"
    run.saver.save(ranks, 1, DRIVER_STATE, last=False)
    with pytest.raises(GuardError, match=r"^1 of the 1 updates .* there is no whole checkpoint yet$"):
        run.take(0, 1)


def test_without_a_limit_warnings_become_rare(tmp_path: Path, caplog: Any) -> None:
    run = Updates(tmp_path, None)
    for _ in range(100):
        run.take(0, 1)
    assert len(caplog.records) == 7, "at 1, 2, 4, 8, 16, 32, 64"
    Updates(tmp_path, 0).guard.check({"actor/loss": math.nan}, 1)  # steps without counts are not checked


# ------------------------------------------------------------------ the engine


def gaps(guard: EngineGap, *values: float) -> list[dict[str, float]]:
    return [
        guard.check({"training/rollout_log_probs_diff_mean": v, "training/rollout_log_probs_diff_max": 3 * v}, step)
        for step, v in enumerate(values, 1)
    ]


def test_a_gap_is_warned_of_again_when_it_doubled(tmp_path: Path, caplog: Any) -> None:
    guard = EngineGap(make_config(tmp_path, engine_gap_bound=0.1))
    metrics = gaps(guard, 0.02, 0.1, 0.15, 0.16, 0.29, 0.31, 0.2, math.nan, math.nan, 0.05)
    assert [step["distill/engine_gap"] for step in metrics[:4]] == [0.02, 0.1, 0.15, 0.16]
    exceeded = [step["distill/engine_gap_exceeded"] for step in metrics]
    assert exceeded == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0], "the bound itself is within it, NaN beyond"
    warnings = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in warnings] == ["step 3", "step 6", "step 8"]
    assert "0.15 nats on average (at most 0.45), above trainer.engine_gap_bound=0.1; so far in 1 steps" in warnings[0]
    assert "so far in 4 steps" in warnings[1]


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
    folder: Path,
    further: dict[str, str] | None = None,
    lengths: tuple[int, int] = (512, 512),
    temperature: float = 0.7,
    **trainer: Any,
) -> TeacherProbe:
    """A probe of 50 shared ids and 10 item tokens. ``further``: vocabularies of further teachers by name."""
    config = make_config(folder, **{"canary_tolerance": 0.5, **trainer})
    rollout = config.actor_rollout_ref.rollout
    rollout.extend_vocab_start_token, rollout.temperature = 50, temperature
    rollout.prompt_length, rollout.response_length = lengths
    config.algorithm.distill.teachers = {name: TeacherConfig(vocabulary=v) for name, v in (further or {}).items()}
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
    assert batch.tensor("attention_mask").all() and not batch.tensor("distill_special_token_mask").any()
    make_probe(tmp_path, lengths=(6, 4)).check({"ref": teacher}, 0)
    assert teacher.batches[1].tensor("input_ids").shape == (1, 10), "no longer than a training row"


def test_teachers_that_know_item_tokens_score_some_and_the_others_none(tmp_path: Path) -> None:
    vocabularies = {"self": "full", "mixed": "stitched", "small": "base"}
    teachers = {role: Teacher() for role in ("ref", *vocabularies)}
    make_probe(tmp_path, vocabularies).check(teachers, 0)
    for role, teacher in teachers.items():
        (batch,) = teacher.batches
        responses = batch.tensor("responses")
        assert torch.equal(batch.tensor("distill_special_token_mask"), (responses >= 50).long())
        largest = 49 if role in ("ref", "small") else 59
        assert int(responses.max()) == largest, f"{role}: spread over all that it knows"


def test_the_largest_difference_is_measured_per_teacher_from_the_start(tmp_path: Path) -> None:
    probe, ref, kept = make_probe(tmp_path, {"kept": "full"}), Teacher(), Teacher()
    teachers = {"ref": ref, "kept": kept}
    assert probe.check(teachers, 0) == RIGHT | {"distill_teacher/kept/teacher_canary": 0}
    kept.error = -0.25
    metrics = RIGHT | {"distill_teacher/kept/teacher_canary": pytest.approx(0.25)}
    assert probe.check(teachers, 10) == metrics
    assert probe.check(teachers, 20) == metrics, "not from the last time"
    lacking, again = Teacher(), make_probe(tmp_path)
    lacking.error = -math.inf  # of an id that it lacks
    assert [again.check({"ref": lacking}, step) for step in (0, 10)] == [RIGHT, RIGHT]


@pytest.mark.parametrize("error", [0.6, -0.6, math.nan, -math.inf])
def test_a_teacher_that_went_wrong_ends_the_run(tmp_path: Path, error: float) -> None:
    probe, ref, kept = make_probe(tmp_path, {"kept": "full"}), Teacher(), Teacher()
    probe.check({"ref": ref, "kept": kept}, 0)
    probe.check({"ref": ref, "kept": kept}, 10)
    kept.error = error
    with pytest.raises(GuardError) as stop:
        probe.check({"ref": ref, "kept": kept}, 20)
    text = str(stop.value)
    assert text.startswith("teacher 'kept' at step 20 scores otherwise than at the run's start")
    assert f"differ by up to {abs(error):.4g} nats, above trainer.canary_tolerance=0.5" in text
    assert "after step 10, where they were right" in text
    assert "there is no whole checkpoint yet" in text


def test_a_fault_in_item_rows_or_in_one_rank_alone_is_found(tmp_path: Path) -> None:
    probe, teacher = make_probe(tmp_path, {"self": "full"}), Teacher()
    probe.check({"self": teacher}, 0)
    teacher.item_error = -0.7
    with pytest.raises(GuardError, match=r"teacher 'self' at step 10 .* by up to 0\.7 nats"):
        probe.check({"self": teacher}, 10)
    other = Teacher()
    other.error, other.row = 1.0, 1
    with pytest.raises(GuardError, match=r"broken from the start: .* by up to 1 nats.* from rank to rank"):
        make_probe(tmp_path, n_gpus_per_node=2).check({"ref": other}, 0)


def resumed(folder: Path, drift: float, **probe: Any) -> tuple[TeacherProbe, Teacher]:
    """A run whose teacher scores otherwise by ``drift`` than in the run before it."""
    first, teacher = make_probe(folder), Teacher()
    first.check({"ref": teacher}, 0)
    teacher.error = drift
    second = make_probe(folder, **probe)
    second.check({"ref": teacher}, 0)
    second.load_state_dict(first.state_dict(), 30)
    return second, teacher


def test_a_resumed_run_is_compared_with_the_first_start(tmp_path: Path) -> None:
    second, teacher = resumed(tmp_path, 0.4)
    assert second.check({"ref": teacher}, 40) == {"distill/teacher_canary": pytest.approx(0.4)}
    with pytest.raises(GuardError, match=r"teacher 'ref' scores otherwise .* step 30: the 127 log-probs .* 0\.6 nats"):
        resumed(tmp_path, 0.6)
    teacher.error = 0.7
    with pytest.raises(GuardError, match="after step 40, where they were right"):
        second.check({"ref": teacher}, 50)


@pytest.mark.parametrize("key", ["data.train_files", "actor_rollout_ref.rollout.val_kwargs.n"])
def test_settings_that_touch_no_teacher_do_not_start_it_over(tmp_path: Path, key: str) -> None:
    with pytest.raises(GuardError):
        resumed(tmp_path, 3.0, resume_allow_changed=[key])


@pytest.mark.parametrize("change", [{"resume_allow_changed": ["teacher"]}, {"temperature": 1.0}], ids=str)
def test_a_teacher_may_be_meant_to_change(tmp_path: Path, caplog: Any, change: dict[str, Any]) -> None:
    second, teacher = resumed(tmp_path, 3.0, **change)
    assert "its probe starts over" in caplog.text
    assert second.check({"ref": teacher}, 40) == RIGHT
    second.load_state_dict(None, 30)  # a checkpoint of a run without a probe
    second.load_state_dict({"tokens": [1], "temperature": 0.7, "log_probs": {"ref": [-9.0]}}, 30)  # one of before


def test_a_teacher_that_scored_other_tokens_starts_over_alone(tmp_path: Path, caplog: Any) -> None:
    first, ref, own = make_probe(tmp_path, {"self": "base"}), Teacher(), Teacher()
    first.check({"ref": ref, "self": own}, 0)
    own.error = 3.0
    second = make_probe(tmp_path, {"self": "full"})
    second.check({"ref": ref, "self": own}, 0)
    second.load_state_dict(first.state_dict(), 30)
    assert "no comparable scores of teacher 'self'" in caplog.text and "'ref'" not in caplog.text
    assert second.check({"ref": ref, "self": own}, 40) == RIGHT | {"distill_teacher/self/teacher_canary": 0}
    ref.error = 0.6
    third = make_probe(tmp_path, {"self": "full"})
    third.check({"ref": ref, "self": own}, 0)
    with pytest.raises(GuardError, match=r"teacher 'ref' scores otherwise .* at step 30"):
        third.load_state_dict(second.state_dict(), 30)


def test_without_a_tolerance_no_teacher_scores(tmp_path: Path) -> None:
    probe, teacher = make_probe(tmp_path, canary_tolerance=None), Teacher()
    assert probe.check({"ref": teacher}, 0) == {} and probe.state_dict() is None and not teacher.batches
    probe.load_state_dict(make_probe(tmp_path).state_dict(), 3)

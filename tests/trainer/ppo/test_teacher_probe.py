"""The canary on fakes: what is scored, what is compared with what, what ends the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from verl.config import PPOConfig, TeacherConfig, TrainerConfig
from verl.protocol import DataProto
from verl.trainer.checkpoint.saver import CheckpointSaver
from verl.trainer.ppo.guards import GuardError
from verl.trainer.ppo.teacher_probe import TeacherProbe, canary_tokens
from verl.workers.actor.dp_actor import SCORED_KEYS


class Teacher:
    """Scores a token by its id, plus an error of its own in one row at one place."""

    def __init__(self) -> None:
        self.error, self.row, self.item_error = 0.0, 0, 0.0
        self.asked: list[DataProto] = []

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        self.asked.append(data)
        scores = -0.1 * data.tensor("responses").float()
        scores[self.row, 2] += self.error
        scores += self.item_error * (data.tensor("responses") >= 50)
        return DataProto.from_dict({"ref_log_prob": scores})


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    settings = {"default_local_dir": str(folder), "canary_tolerance": 0.5, **trainer}
    config = PPOConfig(trainer=TrainerConfig(**settings))
    config.actor_rollout_ref.rollout.extend_vocab_start_token = 50
    config.actor_rollout_ref.rollout.temperature = 0.7
    return config


def make_canary(folder: Path, teachers: dict[str, str] | None = None, **trainer: Any) -> TeacherProbe:
    """``teachers``: vocabularies of further ones by name."""
    config = make_config(folder, **trainer)
    config.algorithm.distill.teachers = {name: TeacherConfig(vocabulary=v) for name, v in (teachers or {}).items()}
    return TeacherProbe(config, 60, CheckpointSaver(config, {}))


def test_the_tokens_are_spread_over_the_shared_ids_and_always_the_same() -> None:
    assert canary_tokens(100, 6) == [0, 61, 23, 85, 47, 9]
    tokens = canary_tokens(151_669, 128)
    assert len(set(tokens)) == 128 and min(tokens) >= 0 and max(tokens) < 151_669
    gaps = [b - a for a, b in zip(sorted(tokens), sorted(tokens)[1:], strict=False)]
    assert max(gaps) < 2.7 * 151_669 / 128, "no stretch of the vocabulary is left out"


def test_every_rank_scores_the_same_row_of_shared_tokens(tmp_path: Path) -> None:
    teacher = Teacher()
    make_canary(tmp_path, n_gpus_per_node=2, teacher_nnodes=1, teacher_n_gpus_per_node=3).check({"ref": teacher}, 0)
    (batch,) = teacher.asked
    assert set(batch.batch.keys()) == set(SCORED_KEYS)
    assert batch.meta_info == {"temperature": 0.7}
    rows = batch.tensor("input_ids")
    assert rows.shape == (3, 128) and (rows == rows[0]).all() and int(rows.max()) < 50
    assert torch.equal(batch.tensor("responses"), rows[:, 1:])
    assert batch.tensor("attention_mask").all() and not batch.tensor("distill_special_token_mask").any()


def test_teachers_that_know_item_tokens_score_some_and_the_others_none(tmp_path: Path) -> None:
    vocabularies = {"self": "full", "mixed": "stitched", "small": "base"}
    teachers = {role: Teacher() for role in ("ref", *vocabularies)}
    canary = make_canary(tmp_path, vocabularies)
    canary.check(teachers, 0)
    for role, teacher in teachers.items():
        (batch,) = teacher.asked
        responses = batch.tensor("responses")
        assert torch.equal(batch.tensor("distill_special_token_mask"), (responses >= 50).long())
        largest = 49 if role in ("ref", "small") else 59
        assert int(responses.max()) == largest, f"{role}: spread over all that it knows"


def test_a_fault_in_item_rows_alone_is_seen(tmp_path: Path) -> None:
    canary, teacher = make_canary(tmp_path, {"self": "full"}), Teacher()
    canary.check({"self": teacher}, 0)
    teacher.item_error = -0.7
    with pytest.raises(GuardError, match=r"teacher 'self' at step 10 .* by up to 0\.7 nats"):
        canary.check({"self": teacher}, 10)


def test_it_is_no_longer_than_a_training_row(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.actor_rollout_ref.rollout.prompt_length, config.actor_rollout_ref.rollout.response_length = 6, 4
    teacher = Teacher()
    TeacherProbe(config, 60, CheckpointSaver(config, {})).check({"ref": teacher}, 0)
    assert teacher.asked[0].tensor("input_ids").shape == (1, 10)


def test_the_largest_difference_is_measured_per_teacher(tmp_path: Path) -> None:
    canary, ref, kept = make_canary(tmp_path, {"kept": "full"}), Teacher(), Teacher()
    teachers = {"ref": ref, "kept": kept}
    assert canary.check(teachers, 0) == {"distill/teacher_canary": 0, "distill_teacher/kept/teacher_canary": 0}
    kept.error = -0.25
    metrics = canary.check(teachers, 10)
    assert metrics == {"distill/teacher_canary": 0, "distill_teacher/kept/teacher_canary": pytest.approx(0.25)}
    assert canary.check(teachers, 20) == metrics, "from the start, not from the last time"


@pytest.mark.parametrize("error", [0.6, -0.6, math.nan, -math.inf])
def test_a_teacher_that_went_wrong_ends_the_run(tmp_path: Path, error: float) -> None:
    canary, ref, kept = make_canary(tmp_path, {"kept": "full"}), Teacher(), Teacher()
    canary.check({"ref": ref, "kept": kept}, 0)
    canary.check({"ref": ref, "kept": kept}, 10)
    kept.error = error
    with pytest.raises(GuardError) as stop:
        canary.check({"ref": ref, "kept": kept}, 20)
    text = str(stop.value)
    assert text.startswith("teacher 'kept' at step 20 scores otherwise than at the run's start")
    assert f"differ by up to {abs(error):.4g} nats, above trainer.canary_tolerance=0.5" in text
    assert "after step 10, where they were right" in text
    assert "there is no whole checkpoint yet" in text


def test_ids_that_the_teacher_lacks_may_count_as_impossible(tmp_path: Path) -> None:
    canary, teacher = make_canary(tmp_path), Teacher()
    teacher.error = -math.inf
    assert [canary.check({"ref": teacher}, step) for step in (0, 10)] == [{"distill/teacher_canary": 0}] * 2


def test_a_rank_that_differs_from_the_others_is_found_at_the_start(tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.error, teacher.row = 1.0, 1
    with pytest.raises(GuardError, match=r"broken from the start.* from rank to rank, by 1 nats"):
        make_canary(tmp_path, n_gpus_per_node=2).check({"ref": teacher}, 0)


def resumed(folder: Path, drift: float, **trainer: Any) -> tuple[TeacherProbe, Teacher]:
    """A run whose teacher scores otherwise by ``drift`` than in the run before it."""
    first, teacher = make_canary(folder), Teacher()
    first.check({"ref": teacher}, 0)
    teacher.error = drift
    second = make_canary(folder, **trainer)
    second.check({"ref": teacher}, 0)
    second.load_state(first.state(), 30)
    return second, teacher


def test_a_resumed_run_is_held_to_the_first_start(tmp_path: Path) -> None:
    second, teacher = resumed(tmp_path, 0.4)
    assert second.check({"ref": teacher}, 40) == {"distill/teacher_canary": pytest.approx(0.4)}
    with pytest.raises(
        GuardError, match=r"teacher 'ref' scores otherwise .* at step 30: the 127 log-probs .* 0\.6 nats"
    ):
        resumed(tmp_path, 0.6)
    teacher.error = 0.7
    with pytest.raises(GuardError, match="after step 40, where they were right"):
        second.check({"ref": teacher}, 50)


def test_a_teacher_that_was_meant_to_change_starts_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    second, teacher = resumed(tmp_path, 3.0, resume_allow_changed=["teacher"])
    assert "the canary starts over" in caplog.text
    assert second.check({"ref": teacher}, 40) == {"distill/teacher_canary": 0}
    with pytest.raises(GuardError):
        resumed(tmp_path, 3.0, resume_allow_changed=["data.train_files"])


def test_sampling_of_validations_touches_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(GuardError):
        resumed(tmp_path, 3.0, resume_allow_changed=["actor_rollout_ref.rollout.val_kwargs.n"])


def test_a_teacher_that_scored_other_tokens_starts_over_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, ref, own = make_canary(tmp_path, {"self": "base"}), Teacher(), Teacher()
    first.check({"ref": ref, "self": own}, 0)
    own.error = 3.0
    second = make_canary(tmp_path, {"self": "full"})
    second.check({"ref": ref, "self": own}, 0)
    second.load_state(first.state(), 30)
    assert "whether teacher 'self' is the same: the canary starts over" in caplog.text
    assert "'ref'" not in caplog.text
    metrics = second.check({"ref": ref, "self": own}, 40)
    assert metrics == {"distill/teacher_canary": 0, "distill_teacher/self/teacher_canary": 0}
    ref.error = 0.6
    with pytest.raises(GuardError, match=r"teacher 'ref' scores otherwise .* at step 30"):
        third = make_canary(tmp_path, {"self": "full"})
        third.check({"ref": ref, "self": own}, 0)
        third.load_state(second.state(), 30)


def test_a_checkpoint_of_before_starts_over_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary, teacher = make_canary(tmp_path), Teacher()
    canary.check({"ref": teacher}, 0)
    canary.load_state({"tokens": [1, 2], "temperature": 0.7, "log_probs": {"ref": [-9.0]}}, 30)
    assert "the canary starts over" in caplog.text
    assert canary.check({"ref": teacher}, 40) == {"distill/teacher_canary": 0}


def test_other_tokens_are_not_compared(tmp_path: Path) -> None:
    first, teacher = make_canary(tmp_path), Teacher()
    first.check({"ref": teacher}, 0)
    config = make_config(tmp_path)
    config.actor_rollout_ref.rollout.temperature = 1.0
    second = TeacherProbe(config, 60, CheckpointSaver(config, {}))
    teacher.error = 3.0
    second.check({"ref": teacher}, 0)
    second.load_state(first.state(), 30)
    assert second.check({"ref": teacher}, 40) == {"distill/teacher_canary": 0}
    second.load_state(None, 30)  # a checkpoint of a run without a canary


def test_without_a_tolerance_no_teacher_is_asked(tmp_path: Path) -> None:
    canary, teacher = make_canary(tmp_path, canary_tolerance=None), Teacher()
    assert canary.check({"ref": teacher}, 0) == {} and canary.state() is None and not teacher.asked
    canary.load_state(make_canary(tmp_path).state(), 3)

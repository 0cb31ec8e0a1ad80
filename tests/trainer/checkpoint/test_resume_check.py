"""Which checkpoints a run may go on from, and what it says where it may not."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config import PPOConfig, PromptTemplateConfig, SyntheticItemPromptsConfig, TeacherConfig, TrainerConfig
from verl.trainer.checkpoint.manifest import seal
from verl.trainer.checkpoint.resume_check import SETTINGS, Kind, kind_of, require_resumable, require_same_run, run_facts
from verl.utils.saved_config import public_dict, save_config


def write_model(folder: Path, hidden: int = 8, weights: bytes = b"w" * 300_000) -> Path:
    folder.mkdir(parents=True)
    config = {"hidden_size": hidden, "rope": {"theta": 1e6}, "transformers_version": folder.name, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> PPOConfig:
    """Settings of a run with models and data on the disk."""
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(tmp_path / "run")))
    config.actor_rollout_ref.model.path = str(write_model(tmp_path / "student"))
    config.actor_rollout_ref.ref.model.path = str(write_model(tmp_path / "teacher", hidden=16))
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "train.parquet")
    config.data.train_files = str(tmp_path / "train.parquet")
    return config


@pytest.fixture
def folder(run: PPOConfig, tmp_path: Path) -> Path:
    """A checkpoint of that run at step 3."""
    folder = tmp_path / "run" / "global_step_3"
    folder.mkdir(parents=True)
    save_config(run, folder / "config.yaml")
    seal(folder, 3, run.trainer.world_size, run_facts(run, "contract-1"))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def check(folder: Path, config: PPOConfig, vocabulary: str | None = "contract-1") -> None:
    require_same_run(folder, config, run_facts(config, vocabulary))


def test_the_same_run_goes_on_in_silence(folder: Path, run: PPOConfig, caplog: pytest.LogCaptureFixture) -> None:
    run.trainer.total_training_steps = 1000
    run.trainer.save_freq = 7
    run.data.cache_dir = "/elsewhere"
    check(folder, run)
    check(folder, run, None)  # trainer.vocab_check=off: not compared
    assert not caplog.text


def test_models_and_data_may_move(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    models = run.actor_rollout_ref
    models.model.path = str(shutil.copytree(tmp_path / "student", tmp_path / "moved" / "student"))
    models.ref.model.path = str(shutil.copytree(tmp_path / "teacher", tmp_path / "moved" / "teacher"))
    run.data.train_files = [shutil.copy(tmp_path / "train.parquet", tmp_path / "moved")]
    check(folder, run)


def test_another_set_of_teachers_or_weights_is_refused(folder: Path, run: PPOConfig) -> None:
    """Keys of the user's own, which one of the two runs may not have at all."""
    run.algorithm.distill.teachers = {"self": TeacherConfig(sources=["rec_*"])}
    run.data.source_weights = {"rec_*": 0.25, "*": 0.75}
    with pytest.raises(ValueError, match=r"algorithm\.distill\.teachers") as error:
        check(folder, run)
    assert "data.source_weights" in str(error.value)
    save_config(run, folder / "config.yaml")
    check(folder, run)
    run.algorithm.distill.teachers = {}
    with pytest.raises(ValueError, match=r"algorithm\.distill\.teachers"):
        check(folder, run)
    both = {"self": TeacherConfig(sources=["rec_*"]), "mixed": TeacherConfig(sources=["rec_why"])}
    run.algorithm.distill.teachers = both
    save_config(run, folder / "config.yaml")
    check(folder, run)
    run.algorithm.distill.teachers = dict(reversed(both.items()))
    with pytest.raises(ValueError, match=r"algorithm\.distill\.teachers"):  # the first that matches counts
        check(folder, run)


@pytest.fixture
def with_teacher(folder: Path, run: PPOConfig, tmp_path: Path) -> PPOConfig:
    """That run, with a further teacher of its own, and the checkpoint of it."""
    teachers = {"mixed": TeacherConfig(path=str(write_model(tmp_path / "mixed", hidden=12)))}
    run.algorithm.distill.teachers = teachers
    reseal(folder, run)
    return run


def reseal(folder: Path, run: PPOConfig) -> None:
    """Make the checkpoint one of these settings."""
    save_config(run, folder / "config.yaml")
    seal(folder, 3, run.trainer.world_size, run_facts(run, "contract-1"))


def test_a_further_teacher_may_move_and_may_not_be_another(
    folder: Path, with_teacher: PPOConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = with_teacher.algorithm.distill.teachers["mixed"]
    mixed.path = str(shutil.copytree(tmp_path / "mixed", tmp_path / "moved" / "mixed"))
    check(folder, with_teacher)
    assert not caplog.text
    mixed.path = str(write_model(tmp_path / "tuned", hidden=12, weights=b"v" * 300_000))
    with pytest.raises(ValueError, match="trained otherwise") as refusal:
        check(folder, with_teacher)
    assert [line.partition(": ")[0] for line in str(refusal.value).splitlines() if line.startswith("- ")] == [
        "- teachers.mixed.weights"
    ]


@pytest.mark.parametrize("path", [None, "hub/unknown"])
def test_a_teachers_path_counts_where_no_facts_stand_for_it(
    folder: Path, with_teacher: PPOConfig, path: str | None
) -> None:
    """Null is the student, of which there are facts under another name; a model that is not here has none."""
    with_teacher.algorithm.distill.teachers["mixed"].path = path
    with pytest.raises(ValueError, match=r"- algorithm\.distill\.teachers\.mixed\.path: ") as refusal:
        check(folder, with_teacher)
    assert str(refusal.value).count("\n- ") == 1
    reseal(folder, with_teacher)
    check(folder, with_teacher)


def test_every_field_of_a_teacher_counts_that_both_versions_know(folder: Path, with_teacher: PPOConfig) -> None:
    text = (folder / "config.yaml").read_text()
    assert "        prompts: any\n" in text
    (folder / "config.yaml").write_text(text.replace("        prompts: any\n", "        gone_since: 1\n"))
    with_teacher.algorithm.distill.teachers["mixed"].prompts = "with_items"
    check(folder, with_teacher)
    with_teacher.algorithm.distill.teachers["mixed"].weight = 0.5
    with pytest.raises(
        ValueError, match=r"- algorithm\.distill\.teachers\.mixed\.weight: 1\.0 .*, 0\.5 now"
    ) as refusal:
        check(folder, with_teacher)
    assert str(refusal.value).count("\n- ") == 1


def other_validation(run: PPOConfig, tmp_path: Path) -> list[str]:
    """Change everything that decides what validations measure; the keys."""
    pq.write_table(pa.table({"prompt": ["c", "d", "e"]}), tmp_path / "other.parquet")
    run.data.val_files = str(tmp_path / "other.parquet")
    run.data.val_max_samples = 2
    run.actor_rollout_ref.rollout.val_kwargs.n = 4
    return ["data.val_files", "data.val_max_samples", "actor_rollout_ref.rollout.val_kwargs.n"]


def test_what_validations_measure_is_fixed_where_both_runs_judge_by_it(
    folder: Path, run: PPOConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pq.write_table(pa.table({"prompt": ["c", "d"]}), tmp_path / "val.parquet")
    run.data.val_files = str(tmp_path / "val.parquet")
    reseal(folder, run)
    before = dataclasses.replace(run.data), dataclasses.replace(run.actor_rollout_ref.rollout.val_kwargs)
    changed = other_validation(run, tmp_path)
    check(folder, run)
    run.trainer.best_metric = "val/reward"
    check(folder, run)  # the run before judged nothing, so nothing rests on what it measured

    run.data, run.actor_rollout_ref.rollout.val_kwargs = before
    reseal(folder, run)
    run.data.val_files = [shutil.copy(tmp_path / "val.parquet", tmp_path / "run")]
    run.trainer.best_metric = "val/reverse_kl min"
    check(folder, run)  # files may move, and what was recorded can be judged by another rule
    other_validation(run, tmp_path)
    with pytest.raises(ValueError, match="trained otherwise") as refusal:
        check(folder, run)
    lines = [line for line in str(refusal.value).splitlines() if line.startswith("- ")]
    assert sorted(line[2:].partition(": ")[0] for line in lines) == sorted(changed)
    assert not caplog.text
    run.trainer.resume_allow_changed = changed
    check(folder, run)
    assert "resuming with another setting: data.val_max_samples: -1 in the checkpoint, 2 now" in caplog.text
    run.trainer.resume_allow_changed, run.trainer.best_metric = [], None
    check(folder, run)
    run.trainer.best_metric, run.trainer.val_only = "val/reward", True
    check(folder, run)


def test_validation_files_of_one_name_are_told_apart(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    run.trainer.best_metric = "val/reward"
    for place, rows in (("general", 3), ("rec", 50), ("other", 900)):
        (tmp_path / place).mkdir()
        pq.write_table(pa.table({"prompt": [str(row) for row in range(rows)]}), tmp_path / place / "test.parquet")

    def files(*places: str) -> list[str]:
        return [str(tmp_path / place / "test.parquet") for place in places]

    run.data.val_files = files("general", "rec")
    reseal(folder, run)
    check(folder, run)
    for others in (("other", "rec"), ("rec",), ("general", "rec", "other")):
        run.data.val_files = files(*others)
        with pytest.raises(ValueError, match=r"data\.val_files"):
            check(folder, run)


def test_validation_files_that_an_older_checkpoint_knows_by_path_alone_are_said(
    folder: Path, run: PPOConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.trainer.best_metric = "val/reward"
    pq.write_table(pa.table({"prompt": ["c", "d"]}), tmp_path / "val.parquet")
    run.data.val_files = str(tmp_path / "val.parquet")
    save_config(run, folder / "config.yaml")
    facts = run_facts(run, "contract-1")
    seal(folder, 3, run.trainer.world_size, {key: facts[key] for key in facts if key != "data.val_files"})
    run.data.val_files = str(shutil.copy(tmp_path / "val.parquet", tmp_path / "moved.parquet"))
    check(folder, run)
    assert "resuming with another setting: data.val_files" in caplog.text


def test_a_key_that_is_new_in_a_map_of_the_users_own_is_a_difference(folder: Path, run: PPOConfig) -> None:
    run.data.apply_chat_template_kwargs = {"enable_thinking": False}
    run.actor_rollout_ref.model.override_config = {"rope_theta": 5}
    with pytest.raises(ValueError, match="trained otherwise") as refusal:
        check(folder, run)
    assert "data.apply_chat_template_kwargs: {} in the checkpoint" in str(refusal.value)
    assert "actor_rollout_ref.model.override_config: {} in the checkpoint" in str(refusal.value)


def test_other_synthetic_prompts_are_refused(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    """Settings count as they are, the catalogue by its content."""
    templates = {"next": PromptTemplateConfig("history: {history}")}
    catalogue = tmp_path / "items.parquet"
    pq.write_table(pa.table({"sid": [[0, 1, 2]]}), catalogue)
    run.data.synthetic_item_prompts = SyntheticItemPromptsConfig(8, str(catalogue), templates)
    with pytest.raises(ValueError, match=r"- data\.synthetic_item_prompts\.count: 0 in the checkpoint, 8 now"):
        check(folder, run)
    save_config(run, folder / "config.yaml")
    seal(folder, 5, 1, run_facts(run, "contract-1"))
    run.data.synthetic_item_prompts.catalogue = str(shutil.copy(catalogue, tmp_path / "moved.parquet"))
    check(folder, run)
    pq.write_table(pa.table({"sid": [[0, 1, 3]]}), tmp_path / "moved.parquet")
    with pytest.raises(ValueError, match=r"- data\.synthetic_item_prompts\.catalogue: ") as refusal:
        check(folder, run)
    assert str(refusal.value).count("\n- ") == 1
    run.data.synthetic_item_prompts.catalogue = None
    with pytest.raises(ValueError, match=r"- data\.synthetic_item_prompts\.catalogue: .*, \[\] now"):
        check(folder, run)


def test_what_changes_the_training_is_refused_and_listed(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    run.algorithm.adv_estimator = "rloo"
    run.data.train_batch_size = 512
    run.actor_rollout_ref.actor.optim.betas = (0.9, 0.95)
    run.actor_rollout_ref.model.path = str(write_model(tmp_path / "wide", hidden=12))
    changed = bytearray(b"w" * 300_000)
    changed[150_000:190_000] = b"v" * 40_000
    run.actor_rollout_ref.ref.model.path = str(write_model(tmp_path / "tuned", hidden=16, weights=bytes(changed)))
    (tmp_path / "train.parquet").write_bytes(b"other")
    with pytest.raises(ValueError, match="trained otherwise") as refusal:
        check(folder, run, "contract-2")
    lines = str(refusal.value).splitlines()
    assert '- algorithm.adv_estimator: "grpo" in the checkpoint, "rloo" now' in lines
    assert "- data.train_batch_size: 1024 in the checkpoint, 512 now" in lines
    assert "- actor_rollout_ref.actor.optim.betas: [0.9, 0.999] in the checkpoint, [0.9, 0.95] now" in lines
    assert "- student.config.hidden_size: 8 in the checkpoint, 12 now" in lines
    assert '- vocabulary: "contract-1" in the checkpoint, "contract-2" now' in lines
    assert any(line.startswith("- teacher.weights: ") for line in lines)
    assert any(line.startswith("- data.train_files: ") for line in lines)
    assert len([line for line in lines if line.startswith("- ")]) == 7
    assert "trainer.resume_mode=disable" in lines[-1]
    assert "trainer.resume_allow_changed=[" in lines[-1]


def test_what_is_named_may_change_and_is_said(
    folder: Path, run: PPOConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.algorithm.distill_adv_min_clip = -10.0
    run.actor_rollout_ref.ref.model.path = str(write_model(tmp_path / "other", hidden=16, weights=b"v" * 300_000))
    run.trainer.resume_allow_changed = ["algorithm.distill_adv_min_clip", "teacher"]
    with caplog.at_level(logging.WARNING):
        check(folder, run)
    assert "algorithm.distill_adv_min_clip: null in the checkpoint, -10.0 now" in caplog.text
    assert "teacher.weights" in caplog.text
    run.trainer.resume_allow_changed = ["algorithm.distill_adv_min"]
    with pytest.raises(ValueError, match="distill_adv_min_clip"):
        check(folder, run)


def test_a_learning_rate_may_change_and_is_said(folder: Path, run: PPOConfig, caplog: pytest.LogCaptureFixture) -> None:
    run.actor_rollout_ref.actor.optim.lr = 2e-6
    run.trainer.n_gpus_per_node = 2
    check(folder, run)
    assert "actor_rollout_ref.actor.optim.lr: 1e-06 in the checkpoint, 2e-06 now" in caplog.text
    assert "resuming on 2 ranks what 1 wrote" in caplog.text


def test_a_key_that_one_version_lacks_is_no_difference(folder: Path, run: PPOConfig) -> None:
    text = (folder / "config.yaml").read_text()
    assert "  gamma: 1.0\n" in text
    (folder / "config.yaml").write_text(text.replace("  gamma: 1.0\n", "  gone_since: 1.0\n"))
    check(folder, run)


def test_every_entry_names_a_setting_and_sections_decide_what_they_should() -> None:
    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        found = {f"{prefix}{name}" for name in values}
        for name, value in values.items():
            found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else set()
        return found

    known = keys(public_dict(PPOConfig()))
    assert not set(SETTINGS) - known
    assert kind_of("algorithm.gamma") is Kind.FIXED
    assert kind_of("actor_rollout_ref.actor.optim.lr") is Kind.SAID
    assert kind_of("actor_rollout_ref.actor.optim.eps") is Kind.FIXED
    assert kind_of("actor_rollout_ref.rollout.name") is Kind.SAID
    assert kind_of("actor_rollout_ref.rollout.n") is Kind.FIXED
    assert kind_of("actor_rollout_ref.ref.model.path") is Kind.FREE
    assert kind_of("trainer.save_freq") is Kind.FREE
    assert {field.name for field in dataclasses.fields(PPOConfig)} <= {key.partition(".")[0] for key in SETTINGS}


def test_a_run_that_has_nothing_left_to_train_is_told_so(folder: Path, run: PPOConfig) -> None:
    facts = run_facts(run, "contract-1")
    require_resumable(run, facts, total_steps=4)
    with pytest.raises(ValueError, match=r"nothing to train: .*global_step_3 is at step 3 .*resume_mode=disable"):
        require_resumable(run, facts, total_steps=3)
    run.trainer.val_only = True
    require_resumable(run, facts, total_steps=3)


def test_validating_a_run_that_is_going_touches_nothing_of_it(folder: Path, run: PPOConfig) -> None:
    unfinished = folder.with_name("global_step_4.unfinished")
    unfinished.mkdir()
    run.trainer.val_only = True
    require_resumable(run, run_facts(run), total_steps=10)
    assert unfinished.exists()
    run.trainer.val_only = False
    require_resumable(run, run_facts(run), total_steps=10)
    assert not unfinished.exists()

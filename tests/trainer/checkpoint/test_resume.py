"""Which checkpoints a run may continue from, and what the message says where it may not."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import chat_files

from verl.config import PPOConfig, PromptTemplateConfig, SyntheticItemPromptsConfig, TeacherConfig, TrainerConfig
from verl.trainer.checkpoint.layout import seal
from verl.trainer.checkpoint.resume import (
    RULES,
    find_resumable,
    model_identity,
    require_same_run,
    rule_of,
    run_identity,
)
from verl.utils.redaction import public_dict, save_config

WEIGHTS = b"w" * 300_000


def write_model(folder: Path, hidden: int = 8, weights: bytes = WEIGHTS) -> str:
    folder.mkdir(parents=True)
    config = {"hidden_size": hidden, "rope": {"theta": 1e6}, "transformers_version": folder.name, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def write_rows(path: Path, rows: int = 2) -> str:
    return str(chat_files.write_rows(path, [{"prompt": str(row)} for row in range(rows)]))


@pytest.fixture
def run(tmp_path: Path) -> PPOConfig:
    """Settings of a run with models and data on the disk."""
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(tmp_path / "run")))
    config.actor_rollout_ref.model.path = write_model(tmp_path / "student")
    config.actor_rollout_ref.ref.model.path = write_model(tmp_path / "teacher", hidden=16)
    config.data.train_files = write_rows(tmp_path / "train.parquet")
    return config


@pytest.fixture
def folder(run: PPOConfig, tmp_path: Path) -> Path:
    """A checkpoint of that run at step 3."""
    folder = tmp_path / "run" / "global_step_3"
    folder.mkdir(parents=True)
    reseal(folder, run)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def reseal(folder: Path, run: PPOConfig) -> None:
    """Make the checkpoint one of these settings."""
    save_config(run, folder / "config.yaml")
    seal(folder, run_identity(run, "contract-1"))


def check(folder: Path, config: PPOConfig, vocabulary: str | None = "contract-1") -> None:
    require_same_run(folder, config, run_identity(config, vocabulary))


def refused(folder: Path, config: PPOConfig, vocabulary: str | None = "contract-1") -> list[str]:
    """The lines of the error, one for each difference."""
    with pytest.raises(ValueError, match="trained with other settings") as refusal:
        check(folder, config, vocabulary)
    *lines, advice = str(refusal.value).splitlines()
    assert "trainer.resume_allow_changed=[" in advice
    return [line.removeprefix("- ") for line in lines[1:]]


def refused_keys(folder: Path, config: PPOConfig) -> list[str]:
    return sorted(line.partition(": ")[0] for line in refused(folder, config))


def test_settings_that_train_the_same_may_differ(folder: Path, run: PPOConfig, tmp_path: Path, caplog: Any) -> None:
    run.trainer.total_training_steps, run.data.dataloader_num_workers, run.data.cache_dir = 1000, 7, "/elsewhere"
    check(folder, run, None)  # trainer.vocab_check=off: not compared
    models = run.actor_rollout_ref
    models.model.path = str(shutil.copytree(tmp_path / "student", tmp_path / "moved" / "student"))
    models.ref.model.path = str(shutil.copytree(tmp_path / "teacher", tmp_path / "moved" / "teacher"))
    run.data.train_files = [shutil.copy(tmp_path / "train.parquet", tmp_path / "moved")]
    check(folder, run)
    assert not caplog.text


def test_learning_rate_and_ranks_may_change(folder: Path, run: PPOConfig, caplog: Any) -> None:
    run.actor_rollout_ref.actor.optim.lr, run.trainer.n_gpus_per_node = 2e-6, 2
    check(folder, run)
    assert "actor_rollout_ref.actor.optim.lr: 1e-06 in the checkpoint, 2e-06 now" in caplog.text
    assert "trainer.n_gpus_per_node: 1 in the checkpoint, 2 now" in caplog.text


def test_what_changes_the_training_is_refused_and_listed(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    run.algorithm.adv_estimator = "rloo"
    run.data.train_batch_size = 512
    run.actor_rollout_ref.actor.optim.betas = (0.9, 0.95)
    run.actor_rollout_ref.model.path = write_model(tmp_path / "wide", hidden=12)
    changed = WEIGHTS[:150_000] + b"v" * 40_000 + WEIGHTS[190_000:]
    run.actor_rollout_ref.ref.model.path = write_model(tmp_path / "tuned", hidden=16, weights=changed)
    (tmp_path / "train.parquet").write_bytes(b"other")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("other")
    lines = refused(folder, run, "contract-2")
    assert {
        'algorithm.adv_estimator: "grpo" in the checkpoint, "rloo" now',
        "data.train_batch_size: 1024 in the checkpoint, 512 now",
        "actor_rollout_ref.actor.optim.betas: [0.9, 0.999] in the checkpoint, [0.9, 0.95] now",
        "student.config.hidden_size: 8 in the checkpoint, 12 now",
        'vocabulary: "contract-1" in the checkpoint, "contract-2" now',
    } < set(lines)
    found = {line.partition(": ")[0] for line in lines}
    assert {"teacher.weights", "teacher.chat_template", "data.train_files"} < found and len(lines) == 8


def test_a_data_set_class_of_ones_own_is_compared_by_the_names_of_its_files(folder: Path, run: PPOConfig) -> None:
    run.data.custom_cls.path = "mine.py"
    reseal(folder, run)
    run.data.train_files = "other.parquet"
    assert refused_keys(folder, run) == ["data.train_files"]


def test_what_is_named_may_change(folder: Path, run: PPOConfig, tmp_path: Path, caplog: Any) -> None:
    run.algorithm.distill_adv_min_clip = -10.0
    run.actor_rollout_ref.ref.model.path = write_model(tmp_path / "other", hidden=16, weights=b"v" * 300_000)
    run.trainer.resume_allow_changed = ["algorithm.distill_adv_min_clip", "teacher"]
    check(folder, run)
    assert "algorithm.distill_adv_min_clip: null in the checkpoint, -10.0 now" in caplog.text
    run.trainer.resume_allow_changed = ["algorithm.distill_adv_min", "teacher"]
    assert refused_keys(folder, run) == ["algorithm.distill_adv_min_clip"]


def test_a_key_that_one_version_lacks_is_no_difference(folder: Path, run: PPOConfig) -> None:
    text = (folder / "config.yaml").read_text()
    assert "  gamma: 1.0\n" in text
    (folder / "config.yaml").write_text(text.replace("  gamma: 1.0\n", "  gone_since: 1.0\n"))
    check(folder, run)


def test_the_tokenizer_of_a_served_teacher_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    alone = model_identity(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    assert model_identity(str(tmp_path)) == alone | {"config.vocab_size": 3} and "tokenizer" in alone


# ------------------------------------------------------------------ maps of the user's own keys


def test_a_key_that_is_new_in_such_a_map_is_a_difference(folder: Path, run: PPOConfig) -> None:
    run.data.apply_chat_template_kwargs = {"enable_thinking": False}
    run.actor_rollout_ref.model.override_config = {"rope_theta": 5}
    run.data.source_weights = {"rec_*": 0.25, "*": 0.75}
    run.algorithm.distill.teachers = {"self": TeacherConfig(sources=["rec_*"])}
    keys = ["actor_rollout_ref.model.override_config", "algorithm.distill.teachers"]
    assert refused_keys(folder, run) == [*keys, "data.apply_chat_template_kwargs", "data.source_weights"]


def test_servers_of_a_teacher_may_move(folder: Path, run: PPOConfig) -> None:
    """But what a teacher reads is part of the run."""
    teacher = run.algorithm.distill.teachers["far"] = TeacherConfig(sources=["a"], url=["http://one"])
    run.actor_rollout_ref.ref.url = ["http://one"]
    reseal(folder, run)
    run.actor_rollout_ref.ref.url, run.actor_rollout_ref.ref.api_key_env = ["http://two", "http://three"], "KEY"
    teacher.url, teacher.api_key_env = ["http://two"], "KEY"
    check(folder, run)
    for place in (run.actor_rollout_ref.ref, teacher):  # or be the run's own
        place.url, place.engine, place.engine_kwargs = [], "vllm", {"tensor_parallel_size": 4}
    check(folder, run)
    run.actor_rollout_ref.ref.system_prompt = teacher.system_prompt = "Be short."
    key = "algorithm.distill.teachers.far.system_prompt"
    assert refused_keys(folder, run) == ["actor_rollout_ref.ref.system_prompt", key]


def test_teachers_are_the_same_in_the_same_order(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    mixed = TeacherConfig(path=write_model(tmp_path / "mixed", hidden=12))
    both = run.algorithm.distill.teachers = {"self": TeacherConfig(sources=["rec_*"]), "mixed": mixed}
    reseal(folder, run)
    for run.algorithm.distill.teachers in (dict(reversed(both.items())), {}):  # the first that matches a source counts
        assert refused_keys(folder, run) == ["algorithm.distill.teachers"]
    run.algorithm.distill.teachers = both
    mixed.path = str(shutil.copytree(tmp_path / "mixed", tmp_path / "moved" / "mixed"))
    check(folder, run)
    mixed.path = write_model(tmp_path / "tuned", hidden=12, weights=b"v" * 300_000)
    assert refused_keys(folder, run) == ["teachers.mixed.weights"]
    for mixed.path in (None, "hub/unknown"):  # the student, whose identity has another name, and one that has none here
        assert refused_keys(folder, run) == ["algorithm.distill.teachers.mixed.path"]


def test_other_synthetic_prompts_are_refused(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    """Settings count as they are, the catalogue by its content."""
    key, templates = "data.synthetic_item_prompts", {"next": PromptTemplateConfig("history: {history}")}
    catalogue = write_rows(tmp_path / "items.parquet")
    run.data.synthetic_item_prompts = SyntheticItemPromptsConfig(8, catalogue, templates)
    assert f"{key}.count: 0 in the checkpoint, 8 now" in refused(folder, run)
    reseal(folder, run)
    run.data.synthetic_item_prompts.catalogue = str(shutil.copy(catalogue, tmp_path / "moved.parquet"))
    check(folder, run)
    write_rows(tmp_path / "moved.parquet", 3)
    assert refused_keys(folder, run) == [f"{key}.catalogue"]


def test_another_catalogue_of_texts_is_refused(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    ref, catalogue = run.actor_rollout_ref.ref, write_rows(tmp_path / "items.parquet")
    ref.item_text = str(catalogue)
    assert refused_keys(folder, run) == ["actor_rollout_ref.ref.item_text"]
    reseal(folder, run)
    ref.item_text = str(shutil.copy(catalogue, tmp_path / "moved.parquet"))
    check(folder, run)
    write_rows(tmp_path / "moved.parquet", 3)
    assert refused_keys(folder, run) == ["actor_rollout_ref.ref.item_text.content"]


# ------------------------------------------------------------------ what validations measure


def test_what_validations_measure_stays_if_both_have_a_rule(folder: Path, run: PPOConfig, tmp_path: Path) -> None:
    run.data.val_files, run.trainer.best_metric = write_rows(tmp_path / "val.parquet"), "val/reward"
    reseal(folder, run)
    run.data.val_files = [shutil.copy(tmp_path / "val.parquet", tmp_path / "run")]
    run.trainer.best_metric = "val/reverse_kl min"
    check(folder, run)  # files may move, and another rule can choose among what was recorded
    run.data.val_files, run.data.val_max_samples = write_rows(tmp_path / "other.parquet", 3), 2
    run.actor_rollout_ref.rollout.val_kwargs.n = 4
    changed = ["actor_rollout_ref.rollout.val_kwargs.n", "data.val_files", "data.val_max_samples"]
    assert refused_keys(folder, run) == changed
    for name, value in (("resume_allow_changed", changed), ("val_only", True), ("best_metric", None)):
        before = getattr(run.trainer, name)
        setattr(run.trainer, name, value)
        check(folder, run)
        setattr(run.trainer, name, before)
    run.trainer.best_metric, run.trainer.keep = None, ["val/reward >= 1"]
    reseal(folder, run)
    run.trainer.keep, run.data.val_max_samples = ["val/reward >= 2"], 3
    assert refused_keys(folder, run) == ["data.val_max_samples", "trainer.keep"]


# ------------------------------------------------------------------ the table, and what surrounds it


def test_every_entry_of_the_table_names_a_setting_and_the_longest_decides() -> None:
    def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            yield f"{prefix}{name}"
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ()

    assert set(RULES) - set(keys(public_dict(PPOConfig()))) == {"student", "teacher", "teachers", "vocabulary"}
    assert {field.name for field in dataclasses.fields(PPOConfig)} <= {key.partition(".")[0] for key in RULES}
    assert rule_of("actor_rollout_ref.actor.optim.lr") == rule_of("actor_rollout_ref.rollout.name") == "warn"
    assert rule_of("actor_rollout_ref.actor.optim.eps") == rule_of("algorithm.gamma") == "refuse"
    assert rule_of("actor_rollout_ref.ref.model.path") == rule_of("trainer.save_freq") == "ignore"


def test_validating_a_run_that_is_going_touches_nothing_of_it(folder: Path, run: PPOConfig) -> None:
    unfinished = folder.with_name("global_step_4.unfinished")
    unfinished.mkdir()
    for run.trainer.val_only, run.trainer.check_only in ((True, False), (False, True), (False, False)):
        assert find_resumable(run, run_identity(run), total_steps=3 + (not run.trainer.val_only)) == folder
        assert unfinished.exists() == (run.trainer.val_only or run.trainer.check_only)

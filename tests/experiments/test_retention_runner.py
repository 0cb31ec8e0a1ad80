"""Variants make valid settings; a run in this process trains, measures, and names what failed."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from experiments.retention.online_retail import OnlineRetailConfig, build
from experiments.retention.results import DONE, FAILED, Extras, Run
from experiments.retention.runner import execute, trainer_settings
from experiments.retention.tweaks import TWEAKS
from experiments.retention.variants import HISTORIES, VARIANTS
from experiments.retention.worker import answer
from experiments.retention.worlds import Prepared
from recipe.onpolicy_distill.quickstart.distillation import EXACT, LEARNING_RATES
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config

pytestmark = pytest.mark.usefixtures("one_rank")


def test_every_variant_is_a_valid_configuration(prepared: Prepared, tmp_path: Path) -> None:
    for name in VARIANTS:
        settings = trainer_settings(Run("quickstart", 0, name, 1, steps=3), prepared, tmp_path, tmp_path)
        overrides = [f"{key}={value}" for key, value in settings.items()]
        config = load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
        check_run(config)
        distill = config.algorithm.distill
        sampled = name.startswith(("public", "sampled", "leak"))
        assert (distill.objective == "exact") == (not sampled), name
        rehearsed = "self" in name or VARIANTS[name].rehearsal == HISTORIES
        assert bool(distill.teachers) == bool(config.data.source_weights) == rehearsed
        assert config.actor_rollout_ref.rollout.horizon.at(3) == (6 if name == "horizon-6" else None)
        assert VARIANTS[name].tweak in (None, *TWEAKS)
        rate = 2e-4 if "low-lr" in name else LEARNING_RATES[EXACT] if name == "quickstart" else 5e-4
        assert config.actor_rollout_ref.actor.optim.lr == rate
        assert (config.actor_rollout_ref.rollout.seed, config.data.seed) == (1, 1)


def test_a_run_may_begin_at_an_average_and_rehearses_the_student_before(prepared: Prepared, tmp_path: Path) -> None:
    settings = trainer_settings(Run("quickstart", 0, "averaged-25", steps=3), prepared, tmp_path, tmp_path / "data")
    folders = (settings["actor_rollout_ref.model.path"], prepared.student, prepared.teacher)
    begun, student, teacher = (load_file(folder / "model.safetensors")["model.norm.weight"] for folder in folders)
    torch.testing.assert_close(begun, 0.75 * student + 0.25 * teacher)
    assert settings["++algorithm.distill.teachers.self.path"] == str(prepared.student)


@pytest.mark.usefixtures("small")
def test_a_run_trains_and_measures_and_leaves_its_metrics(tmp_path: Path) -> None:
    record = execute(Run("quickstart", 0, "exact-self-items", 0, steps=2), tmp_path)
    assert (record["status"], record["steps"]) == (DONE, 2)
    assert [step for step, _ in record["curve"]] == [0, 2]
    # The trainer's own validation and the scoreboard ask the same model the same questions.
    assert record["curve"][-1][1] == pytest.approx(record["metrics"]["general_accuracy"])
    assert record["seconds"] > 0 and {"rec_recall", "free_rate", "leak_rate"} <= set(record["metrics"])
    folder = tmp_path / "runs" / "quickstart-student0-exact-self-items-seed0-2steps"
    assert (folder / "metrics.jsonl").is_file() and not list(folder.glob("global_step_*"))
    timed = execute(Run("quickstart", 0, "sampled", 0, seconds=1e-3), tmp_path)
    assert (timed["status"], timed["steps"]) == (DONE, 1), "it ends with the step that passes its seconds"
    before = execute(Run("quickstart", 0, "before"), tmp_path, Extras(recall_at=[16]))["metrics"]
    assert before["rec_recall_at_16"] == 1.0, "there are 16 items"
    assert "rec_recall_at_16" not in record["metrics"]
    assert before["reverse_kl"] != record["metrics"]["reverse_kl"], "it was trained"


@pytest.mark.usefixtures("small")
def test_a_run_that_cannot_start_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = dataclasses.replace(VARIANTS["exact"], settings={"algorithm.distill.no_such_key": 1})
    monkeypatch.setitem(VARIANTS, "exact", unknown)
    record = answer(Run("quickstart", 0, "exact", 0, steps=2), tmp_path, Extras())
    assert record["status"] == FAILED and "no_such_key" in record["message"]
    assert answer(Run("nowhere", 0, "before"), tmp_path, Extras())["message"].startswith("ValueError: --world nowhere")


def test_real_purchases_make_a_world_of_the_same_form(shared_data: Path, tmp_path: Path) -> None:
    sizes = {"general_train": 100, "general_test": 25, "rec_train": 200, "test_prompts": 20, "test_captions": 5}
    world = build(tmp_path, OnlineRetailConfig(items=64, **sizes), shared_data)
    catalogue = {row["item"]: row["text"] for row in pq.read_table(world.catalogue).to_pylist()}
    assert len(catalogue) == len(set(catalogue.values())) == 64
    assert world.extend_vocab_start_token == 8218
    train, test = (pq.read_table(path).to_pylist() for path in (world.rec_train, world.rec_test))
    assert (len(train), len(test)) == (200, 25)
    for row in test[:20]:
        question, answer = (message["content"][0]["text"] for message in json.loads(row["messages"]))
        metadata = json.loads(row["metadata"])
        assert question == "history: " + "".join(catalogue[pid] for pid in metadata["history"])
        assert answer == catalogue[metadata["target_item"]] == metadata["answer"]

"""Variants make valid settings; a run in this process trains, measures, and says what failed."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.small_world import build_small_world, short_student, short_teacher

from experiments.retention import worlds
from experiments.retention.online_retail import OnlineRetailConfig, build
from experiments.retention.results import DONE, FAILED, Run
from experiments.retention.runner import execute, scoreboard, trainer_settings
from experiments.retention.synthetic import PromptShape, synthetic_prompts
from experiments.retention.variants import CODES, HISTORIES, ITEMS, VARIANTS
from experiments.retention.worker import answer
from experiments.retention.worlds import Prepared
from recipe.onpolicy_distill.evaluate import EvaluationConfig, evaluate
from recipe.onpolicy_distill.quickstart.models import make_student, make_teacher
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config

pytestmark = pytest.mark.usefixtures("one_rank")

CLOCK = ("seconds", "seconds_by_phase")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("cache")
    world = build_small_world(folder)
    teacher = make_teacher(world, folder, short_teacher())
    student = make_student(world, teacher, folder, short_student())
    rehearsal = {
        HISTORIES: world.rec_train,
        **synthetic_prompts(world, PromptShape(0, 4, codes_per_level=4, prompts=300), folder),
    }
    return Prepared(world, teacher, student, rehearsal, max_prompt_tokens=64, max_answer_tokens=12)


@pytest.fixture
def small(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """The quickstart's world is a small one."""
    monkeypatch.setitem(worlds.WORLDS, "quickstart", lambda seed, folder: prepared)
    return prepared


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_configuration(name: str, prepared: Prepared, tmp_path: Path) -> None:
    settings = trainer_settings(Run("quickstart", 0, name, 1, steps=3), prepared, tmp_path, tmp_path)
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    check_run(config)
    assert (config.algorithm.distill.objective == "exact") == name.startswith(("exact", "stitched"))
    assert bool(config.algorithm.distill.teachers) == ("self" in name or name == "stitched")
    assert bool(config.data.source_weights) == bool(config.algorithm.distill.teachers)
    assert config.actor_rollout_ref.actor.optim.lr == (2e-4 if "low-lr" in name else 5e-4)
    assert (config.actor_rollout_ref.rollout.seed, config.data.seed) == (1, 1)


def test_made_up_prompts_are_like_the_recommenders_and_nobodys(prepared: Prepared) -> None:
    catalogue = set(pq.read_table(prepared.world.catalogue)["text"].to_pylist())
    for name in (ITEMS, CODES):
        rows = pq.read_table(prepared.rehearsal[name]).to_pylist()
        assert {row["source"] for row in rows} == {"rec_next", "rec_caption"}
        asked = [json.loads(row["messages"])[0]["content"][0]["text"] for row in rows]
        items = [f"<|sid_begin|>{part}" for text in asked for part in text.split("<|sid_begin|>")[1:]]
        assert (set(items) <= catalogue) == (name == ITEMS)
        histories = [text.count("<|sid_begin|>") for text in asked if text.startswith("history: ")]
        assert set(histories) == {4}


def test_a_run_trains_and_measures_and_leaves_its_metrics(small: Prepared, tmp_path: Path) -> None:
    record = execute(Run("quickstart", 0, "exact-self-items", 0, steps=2), tmp_path)
    assert (record["status"], record["steps"]) == (DONE, 2)
    assert [step for step, _ in record["curve"]] == [0, 2]
    # The trainer's own validation and the scoreboard ask the same model the same questions.
    assert record["curve"][-1][1] == pytest.approx(record["metrics"]["general_accuracy"])
    assert record["seconds"] > 0 and {"rec_recall", "free_rate", "leak_rate"} <= set(record["metrics"])
    folder = tmp_path / "runs" / "quickstart-student0-exact-self-items-seed0-2steps"
    assert (folder / "metrics.jsonl").is_file() and not list(folder.glob("global_step_*"))
    before = execute(Run("quickstart", 0, "before"), tmp_path)["metrics"]
    assert before["reverse_kl"] != record["metrics"]["reverse_kl"], "it was trained"


def test_a_run_of_some_seconds_ends_with_the_step_that_passes_them(small: Prepared, tmp_path: Path) -> None:
    record = execute(Run("quickstart", 0, "sampled", 0, seconds=1e-3), tmp_path)
    assert (record["status"], record["steps"]) == (DONE, 1)
    assert [step for step, _ in record["curve"]] == [0, 1]


def test_a_run_that_cannot_start_is_a_result(small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = dataclasses.replace(VARIANTS["exact"], settings={"algorithm.distill.no_such_key": 1})
    monkeypatch.setitem(VARIANTS, "exact", unknown)
    record = answer(Run("quickstart", 0, "exact", 0, steps=2), tmp_path)
    assert record["status"] == FAILED and "no_such_key" in record["message"]
    assert answer(Run("nowhere", 0, "before"), tmp_path)["message"].startswith("ValueError: --world nowhere")


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
        told = json.loads(row["metadata"])
        assert question == "history: " + "".join(catalogue[pid] for pid in told["history"])
        assert answer == catalogue[told["target_item"]] == told["answer"]
    general = pq.read_table(world.general_test).to_pylist()
    reversing = next(row for row in general if row["source"] == "general_reverse")
    question, answer = (message["content"][0]["text"] for message in json.loads(reversing["messages"]))
    assert question.removeprefix("reverse: ").split() == answer.split()[::-1]


def test_the_scoreboard_is_that_of_evaluate(prepared: Prepared) -> None:
    world = prepared.world
    plain = EvaluationConfig(
        model=str(prepared.student),
        teacher=str(prepared.teacher),
        general=str(world.general_test),
        rec=str(world.rec_test),
        catalogue=str(world.catalogue),
        extend_vocab_start_token=world.extend_vocab_start_token,
        engine="hf",
        device="cpu",
        max_prompt_length=64,
        max_new_tokens=12,
    )
    expected = evaluate(plain).metrics
    metrics = scoreboard(prepared, prepared.student)
    for metric in expected.keys() - {*CLOCK}:
        assert metrics[metric] == pytest.approx(expected[metric], rel=1e-4), metric

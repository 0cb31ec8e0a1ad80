"""The experiment as a whole: its command line, its settings, and on a small scale its result."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.small_world import SHORT_STUDENT, SHORT_TEACHER, SMALL, build_small_world

from recipe.onpolicy_distill.quickstart import __main__ as quickstart
from recipe.onpolicy_distill.quickstart import models, world
from recipe.onpolicy_distill.quickstart.baseline import popularity_metrics
from recipe.onpolicy_distill.quickstart.distillation import STEPS, Distillation
from recipe.onpolicy_distill.quickstart.scoreboard_table import popularity_line
from verl.trainer.launch.typed import load_config
from verl.utils.dataset.items import make_prompt_file
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_small_world(tmp_path_factory.mktemp("quickstart"))


def settings_of(small, **changes):
    run = Distillation(small, Path("/t"), Path("/s"), Path("/run"), **{"steps": 8, "seed": 3, **changes})
    return [argument for argument in run.command() if "=" in argument]


def test_arguments():
    args = quickstart.parse_args(["trainer.test_freq=5", "--seed", "2", "data.seed=1", "--mode", "public-fork"])
    assert (args.seed, args.steps, args.objective, args.mode) == (2, STEPS["sampled"], "sampled", "public-fork")
    assert args.overrides == ["trainer.test_freq=5", "data.seed=1"]
    args = quickstart.parse_args([])
    assert (args.steps, args.objective, args.mode) == (STEPS["exact"], "exact", "masked")
    assert quickstart.parse_args(["--objective", "sampled", "--steps", "7"]).steps == 7


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "0"],
        ["--mode", "other"],
        ["--sed", "1"],
        ["--mode", "public-fork", "--objective", "exact"],
        ["--rehearsal", "codes", "--objective", "sampled"],
        ["--rehearsal", "items", "--mode", "public-fork"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        quickstart.parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_the_modes_differ_in_the_mask_and_in_what_the_teacher_reads(small):
    masked, fork = (settings_of(small, objective="sampled", mode=mode) for mode in ("masked", "public-fork"))
    end = hf_tokenizer(small.teacher_tokenizer).eos_token_id
    assert fork[: len(masked)] == masked
    assert fork[len(masked) :] == [
        "actor_rollout_ref.rollout.mask_after_extend_token=False",
        f"actor_rollout_ref.ref.ref_replace_token_id={end}",
    ]


@pytest.mark.parametrize("objective", ["exact", "sampled"])
@pytest.mark.parametrize("mode", ["masked", "public-fork"])
def test_settings_are_settings_of_the_entry_point(small, objective, mode):
    if (objective, mode) != ("exact", "public-fork"):
        config = load_config(
            settings_of(small, objective=objective, mode=mode),
            "recipe.onpolicy_distill.config",
            "onpolicy_distill_trainer",
        )
        distill = config.algorithm.distill
        assert distill.is_exact == (objective == "exact")
        assert distill.teacher_knows_extended("rec_next") == distill.is_exact and not distill.teacher_knows_extended(
            "general_add"
        )


@pytest.mark.parametrize("rehearsal", ["items", "codes"])
def test_rehearsal_without_data_asks_as_the_world_does(small, rehearsal, tmp_path):
    """Its prompts have the form of the world's own, and only those of the catalogue its items."""
    settings = settings_of(small, rehearsal=rehearsal, overrides=[f"data.cache_dir={tmp_path}"])
    config = load_config(settings, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    assert config.data.train_files == [str(small.general_train)]
    assert sum(config.data.source_weights.values()) == pytest.approx(1)
    config.data.synthetic_item_prompts.count = 200
    made = make_prompt_file(config.data, hf_tokenizer(small.student_tokenizer), None)
    rows, real = (pq.read_table(path).to_pylist() for path in (made, small.rec_train))
    items = {row["text"] for row in pq.read_table(small.catalogue).to_pylist()}
    form, item = {}, re.compile(r"<\|sid_begin\|>.*?<\|sid_end\|>")
    for row in real:
        form[row["source"]] = item.sub("I", json.loads(row["messages"])[0]["content"][0]["text"])
    drawn = set()
    for row in rows:
        text = json.loads(row["messages"])[0]["content"]
        drawn.update(item.findall(text))
        assert item.sub("", text) == form[row["source"]].replace("I", "")
    assert {row["source"] for row in rows} == set(form)
    assert (drawn <= items) == (rehearsal == "items")
    assert set(config.data.source_weights) == {"rec_next", "rec_caption", "general_*"}


def test_the_user_has_the_last_word(small):
    assert settings_of(small, overrides=["data.seed=9"])[-1] == "data.seed=9"


def test_checkpoints_come_in_the_order_of_their_steps(small, tmp_path):
    for step in (100, 20, 5):
        (tmp_path / f"global_step_{step}" / "actor" / "huggingface").mkdir(parents=True)
    (tmp_path / "global_step_7" / "actor").mkdir(parents=True)
    run = Distillation(small, tmp_path, tmp_path, tmp_path, steps=100, seed=0)
    assert [step for step, _ in run.checkpoints()] == [5, 20, 100]


def test_popularity_by_hand(small):
    """Recounted the long way round: from the histories as text."""
    text = {row["item"]: row for row in pq.read_table(small.catalogue).to_pylist()}
    best = sorted(text, key=lambda item: -text[item]["popularity"])[:5]
    rows = [row for row in pq.read_table(small.rec_test).to_pylist() if row["source"] == "rec_next"]
    wanted = [json.loads(row["messages"])[-1]["content"][0]["text"] for row in rows]
    favourites = [text[item]["text"] for item in best]
    metrics = popularity_metrics(small)
    assert metrics["rec_recall"] == sum(answer in favourites for answer in wanted) / len(wanted) > 0
    assert metrics["rec_recall_at_1"] == sum(answer == favourites[0] for answer in wanted) / len(wanted)
    assert popularity_line({"popularity": metrics}).endswith(f"Recall@5 {metrics['rec_recall']:.1%}")
    assert popularity_line({}) == ""


@pytest.mark.slow
def test_the_whole_experiment_and_what_a_second_one_makes_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world, "WorldConfig", lambda seed: WORLD_CONFIG(**SMALL, seed=seed))
    monkeypatch.setattr(models, "TeacherConfig", lambda seed: TEACHER_CONFIG(**SHORT_TEACHER, seed=seed))
    monkeypatch.setattr(models, "StudentConfig", lambda seed: STUDENT_CONFIG(**SHORT_STUDENT, seed=seed))
    arguments = ["--out", str(tmp_path), "--steps", "2", "data.train_batch_size=8", "trainer.n_gpus_per_node=1"]

    quickstart.main([*arguments, "--seed", "1"])
    console = capsys.readouterr().out
    assert "[6/6]" in console and "General tasks, exact answers" in console
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 1 and summary["steps"] == 2 and summary["objective"] == "exact"
    assert set(summary["seconds"]) == {"total", *PHASES}
    assert "general_accuracy" in summary["teacher"]
    for when in ("before", "after"):
        assert set(SCORED) <= set(summary[when])
    assert set(summary["half_way"]) == {"1"} and "rec_recall" in summary["half_way"]["1"]
    page = (tmp_path / "report.html").read_text()
    for heading in ("General accuracy", "Recommendation", "Reverse KL to the teacher", "Step time by stage"):
        assert heading in page
    metrics = [json.loads(line)["data"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/rec_next/reward", "val/general_add/reverse_kl"} <= set(metrics[0])
    assert "val/rec_next/reverse_kl" not in metrics[0], "the teacher cannot read such prompts"
    made = sorted(folder.name for folder in (tmp_path / "cache").iterdir())
    assert [name.split("-")[0] for name in made] == ["student", "teacher", "world"]

    quickstart.main([*arguments, "--seed", "1", "--mode", "public-fork"])
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == made
    fork = json.loads((tmp_path / "public-fork" / "summary.json").read_text())
    assert fork["mode"] == "public-fork" and fork["before"]["rec_recall"] == summary["before"]["rec_recall"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


PHASES = ("world", "teacher", "student", "scoreboard_before", "distillation", "scoreboard_after")
SCORED = ("general_accuracy", "general_accuracy_by_task", "rec_recall", "rec_recall_at_1", "leak_rate", "extend_mass")
SCORED = (*SCORED, "reverse_kl")
WORLD_CONFIG, TEACHER_CONFIG, STUDENT_CONFIG = world.WorldConfig, models.TeacherConfig, models.StudentConfig

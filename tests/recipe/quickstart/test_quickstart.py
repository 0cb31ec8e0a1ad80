"""The experiment as a whole: its command line, its settings, and on a small scale its result."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.small_world import SHORT_STUDENT, SHORT_TEACHER, SMALL

from recipe.onpolicy_distill.quickstart import __main__ as quickstart
from recipe.onpolicy_distill.quickstart import distillation, models, scoreboard, world
from recipe.onpolicy_distill.quickstart.distillation import STEPS, Distillation
from recipe.onpolicy_distill.quickstart.scoreboard import popularity_line, popularity_metrics
from recipe.onpolicy_distill.synthetic_item_prompts import make_prompt_file
from verl.trainer.launch.typed import load_config
from verl.utils.tokenizer import hf_tokenizer


def settings_of(small_world, **changes):
    run = Distillation(small_world, Path("/t"), Path("/s"), Path("/run"), **{"steps": 8, "seed": 3, **changes})
    return [argument for argument in run.command() if "=" in argument]


def config_of(small_world, **changes):
    settings = settings_of(small_world, **changes)
    return load_config(settings, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def test_arguments():
    args = quickstart.parse_args(["trainer.test_freq=5", "--seed", "2", "data.seed=1", "--mode", "public-fork"])
    assert (args.seed, args.steps, args.objective, args.mode) == (2, STEPS["sampled"], "sampled", "public-fork")
    assert args.overrides == ["trainer.test_freq=5", "data.seed=1"]
    args = quickstart.parse_args([])
    assert (args.steps, args.objective, args.mode) == (STEPS["exact"], "exact", "masked")


def test_folders_with_any_name(small_world):
    world = dataclasses.replace(small_world, general_test=Path("/a=b (c)/test.parquet"))
    assert config_of(world).data.val_files[0] == "/a=b (c)/test.parquet"


def test_bad_arguments(capsys):
    steps, fork = ["--steps", "0"], ["--mode", "public-fork"]
    for argv in (steps, [*fork, "--objective", "exact"], ["--rehearsal", "codes", "--objective", "sampled"]):
        with pytest.raises(SystemExit, match="2"):
            quickstart.parse_args(argv)
        assert f"{argv[0]} {argv[1]}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        quickstart.parse_args(["trainer.save_freq=-1"])
    assert "trainer.save_freq=-1: the quickstart finds its checkpoints" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    with pytest.raises(SystemExit, match=r"error: .*run, which a new run replaces, holds something else"):
        quickstart.main(["--out", str(tmp_path)])


def test_the_folder_of_a_run_that_did_not_start_is_replaced(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "run_child", lambda *_: 1)
    with pytest.raises(RuntimeError, match="the distillation ended with code 1"):
        Distillation(small_world, Path("/t"), Path("/s"), tmp_path / "run", steps=8, seed=3).run()
    monkeypatch.setattr(world, "build", lambda *_: (_ for _ in ()).throw(RuntimeError("it goes on")))
    with pytest.raises(SystemExit, match=r"^error: it goes on"):
        quickstart.main(["--out", str(tmp_path)])


def test_the_modes_differ_in_the_mask_and_in_what_the_teacher_reads(small_world):
    masked, fork = (settings_of(small_world, objective="sampled", mode=mode) for mode in ("masked", "public-fork"))
    end = hf_tokenizer(small_world.teacher_tokenizer).eos_token_id
    further = ["rollout.mask_after_extend_token=False", f"ref.ref_replace_token_id={end}"]
    assert fork == [*masked, *(f"actor_rollout_ref.{setting}" for setting in further)]
    config = config_of(small_world, objective="sampled", mode="public-fork", overrides=["data.seed=9"])
    assert config.data.seed == 9, "the user has the last word"


@pytest.mark.parametrize("rehearsal", ["items", "codes"])
def test_rehearsal_without_data_asks_as_the_world_does(small_world, rehearsal, tmp_path):
    """Its prompts have the form of the world's own, and only those of the catalogue its items."""
    data = config_of(small_world, rehearsal=rehearsal, overrides=[f"data.cache_dir={tmp_path}"]).data
    assert data.train_files == [str(small_world.general_train)]
    assert sum(data.source_weights.values()) == pytest.approx(1)
    assert set(data.source_weights) == {"rec_next", "rec_caption", "general_*"}
    data.synthetic_item_prompts.count = 200
    made = make_prompt_file(data, hf_tokenizer(small_world.student_tokenizer))
    rows, real = (pq.read_table(path).to_pylist() for path in (made, small_world.rec_train))
    catalogue = {row["text"] for row in pq.read_table(small_world.catalogue).to_pylist()}
    item, drawn = re.compile(r"<\|sid_begin\|>.*?<\|sid_end\|>"), set()
    form = {row["source"]: item.sub("", json.loads(row["messages"])[0]["content"][0]["text"]) for row in real}
    for row in rows:
        text = json.loads(row["messages"])[0]["content"]
        drawn.update(item.findall(text))
        assert item.sub("", text) == form[row["source"]]
    assert {row["source"] for row in rows} == set(form)
    assert (drawn <= catalogue) == (rehearsal == "items")


def test_popularity_by_hand(small_world):
    """Recounted the long way round: from the histories as text."""
    items = pq.read_table(small_world.catalogue).to_pylist()
    favourites = [row["text"] for row in sorted(items, key=lambda row: -row["popularity"])[:5]]
    rows = [row for row in pq.read_table(small_world.rec_test).to_pylist() if row["source"] == "rec_next"]
    wanted = [json.loads(row["messages"])[-1]["content"][0]["text"] for row in rows]
    metrics = popularity_metrics(small_world)
    assert metrics["rec_recall"] == sum(answer in favourites for answer in wanted) / len(wanted) > 0
    assert metrics["rec_recall_at_1"] == sum(answer == favourites[0] for answer in wanted) / len(wanted)
    assert popularity_line({"popularity": metrics}).endswith(f"Recall@5 {metrics['rec_recall']:.1%}")


@pytest.mark.slow
def test_the_whole_experiment_and_what_a_second_one_makes_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world, "WorldConfig", partial(world.WorldConfig, **SMALL))
    monkeypatch.setattr(models, "TeacherConfig", partial(models.TeacherConfig, **SHORT_TEACHER))
    monkeypatch.setattr(models, "StudentConfig", partial(models.StudentConfig, **SHORT_STUDENT))
    arguments = ["--out", str(tmp_path), "--steps", "2", "data.train_batch_size=8", "trainer.n_gpus_per_node=1"]

    quickstart.main([*arguments, "--seed", "1"])
    console = capsys.readouterr().out
    assert "[6/6]" in console and "General tasks, exact answers" in console
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["seed"], summary["steps"], summary["objective"]) == (1, 2, "exact")
    phases = {"world", "teacher", "student", "scoreboard_before", "distillation", "scoreboard_after"}
    assert set(summary["seconds"]) == {"total", *phases}
    assert "general_accuracy" in summary["teacher"] and "rec_recall" in summary["half_way"]["1"]
    scored = {"general_accuracy_by_task", "rec_recall", "rec_recall_at_1", "leak_rate", "extend_mass", "reverse_kl"}
    assert scored <= set(summary["before"]) and scored <= set(summary["after"])
    assert "Step time by stage" in (tmp_path / "report.html").read_text()
    metrics = [json.loads(line)["data"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/rec_next/reward", "val/general_add/reverse_kl"} <= set(metrics[0])
    assert "val/rec_next/reverse_kl" not in metrics[0], "the teacher cannot read such prompts"
    made = sorted(folder.name for folder in (tmp_path / "cache").iterdir())
    assert [name.split("-")[0] for name in made] == ["student", "teacher", "world"]

    # Rankings do not depend on the engine, as is seen below, and this one starts at once.
    monkeypatch.setattr(scoreboard, "score", partial(scoreboard.score, engine="hf"))
    again = ["--steps", "1", "actor_rollout_ref.rollout.name=hf", "--mode", "public-fork"]
    quickstart.main([*arguments, "--seed", "1", *again])
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == made
    fork = json.loads((tmp_path / "public-fork" / "summary.json").read_text())
    assert fork["mode"] == "public-fork" and fork["before"]["rec_recall"] == summary["before"]["rec_recall"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

"""Saving while training: what is in place when, what a failure costs, what a kill leaves."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.file_faults import full_disk, killed_at_change, remount, small_disk
from support.saving_ranks import DRIVER_STATE, FakeRanks

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.layout import (
    LATEST,
    clear_leftovers,
    find_checkpoint,
    find_faults,
    newest_whole,
    read_manifest,
    step_folder,
    unfinished_folder,
)
from verl.trainer.checkpoint.resume import load_driver_state
from verl.trainer.checkpoint.saver import CheckpointError, CheckpointSaver


def make_saver(root: Path, **trainer: Any) -> CheckpointSaver:
    settings = {"save_freq": 1, "async_save": False, "n_gpus_per_node": 2} | trainer
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(root), **settings))
    return CheckpointSaver(config, {"model": "m"}, BestCheckpoint(config.trainer, None))


def save(saver: CheckpointSaver, step: int, ranks: FakeRanks | None = None, last: bool = False) -> dict[str, float]:
    return saver.save(ranks or FakeRanks(), step, DRIVER_STATE, last=last)


def save_steps(root: Path, *steps: int, **trainer: Any) -> None:
    saver = make_saver(root, **trainer)
    for step in steps:
        save(saver, step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def auto(root: Path) -> Path | None:
    return find_checkpoint(TrainerConfig(default_local_dir=str(root)))


# ------------------------------------------------------------------ when all goes well


def test_a_checkpoint_gets_its_name_when_every_rank_is_done(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, async_save=True), FakeRanks()
    ranks.slow = True
    metrics = save(saver, 1, ranks)
    assert metrics.keys() == {"training/failed_saves", "timing_s/save_checkpoint"}
    assert names(tmp_path) == ["global_step_1.unfinished"]
    assert saver.poll() == {"training/failed_saves": 0}
    assert auto(tmp_path) is None
    ranks.slow = False
    assert saver.poll()["timing_s/save_checkpoint/write"] == 3.0, "the slowest rank's"
    assert names(tmp_path) == ["global_step_1", LATEST]
    assert auto(tmp_path) == step_folder(tmp_path, 1)
    assert saver.poll() == {"training/failed_saves": 0}


def test_one_checkpoint_is_written_at_a_time_and_the_last_is_waited_for(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, async_save=True), FakeRanks()
    ranks.slow = True
    save(saver, 1, ranks)
    save(saver, 2, ranks)
    assert names(tmp_path)[:2] == ["global_step_1", "global_step_2.unfinished"]
    save(saver, 3, ranks, last=True)
    assert auto(tmp_path) == step_folder(tmp_path, 3)
    saver.finish()


def test_a_checkpoint_holds_manifest_settings_and_driver_state(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    folder = step_folder(tmp_path, 4)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.identity) == (4, 2, {"model": "m"})
    export = "actor/huggingface/model.safetensors"
    assert manifest.files.keys() == {"actor/shard_0", "actor/shard_1", "config.yaml", "data.pt", export}
    assert load_driver_state(folder) == DRIVER_STATE | {"metrics": {"training/failed_saves": 0.0}}


def test_names_of_before_are_read(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    folder = step_folder(tmp_path, 4)
    torch.save({"epoch": 2, "canary": None, "figures": {"a": 1.0}}, folder / "data.pt")
    assert load_driver_state(folder) == {"epoch": 2, "teacher_probe": None, "metrics": {"a": 1.0}}
    content = json.loads((folder / "manifest.json").read_text())
    content["facts"] = content.pop("identity")
    (folder / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(folder).identity == {"model": "m"}


def test_a_saved_driver_state_runs_no_code(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    torch.save({"loader": PPOConfig()}, step_folder(tmp_path, 4) / "data.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_driver_state(step_folder(tmp_path, 4))


def test_the_newest_whole_checkpoints_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 6, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:2] == ["global_step_4", "global_step_6"]
    (step_folder(tmp_path, 6) / "data.pt").unlink()
    save_steps(tmp_path, 8, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:3] == ["global_step_4", "global_step_6", "global_step_8"], "step 6 does not count"
    save_steps(tmp_path, 9, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:2] == ["global_step_8", "global_step_9"]
    save(make_saver(tmp_path), 9, FakeRanks(num_bytes=20))
    assert read_manifest(step_folder(tmp_path, 9)).files["actor/shard_0"] == 20, "a step that is taken again"
    assert names(tmp_path) == ["global_step_8", "global_step_9", LATEST]


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "actor" / "shard_1").write_bytes(b"x" * 9), "actor/shard_1 has 9 of 10 bytes"),
        (lambda folder: (folder / "actor" / "shard_0").unlink(), "actor/shard_0 is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json, so its writing was never finished"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 4'), r"manifest\.json is damaged"),
        (shutil.rmtree, "it is not there"),
    ],
    ids=["truncated", "missing", "no manifest", "damaged manifest", "gone"],
)
def test_a_whole_checkpoint_replaces_a_damaged_one(tmp_path: Path, caplog: Any, damage: Any, words: str) -> None:
    save_steps(tmp_path, 2, 4)
    damage(step_folder(tmp_path, 4))
    assert auto(tmp_path) == step_folder(tmp_path, 2)
    with pytest.raises(ValueError, match=f"trainer.resume_from_path=.*global_step_4.*{words}"):
        find_checkpoint(TrainerConfig(resume_mode="resume_path", resume_from_path=str(step_folder(tmp_path, 4))))
    shutil.rmtree(step_folder(tmp_path, 2))
    with pytest.raises(ValueError, match=f"resume_mode=disable to start afresh:\n- .*global_step_4.*{words}"):
        auto(tmp_path)
    assert "resuming from the older" in caplog.text


def test_an_export_that_was_moved_and_a_garbled_latest_file_do_no_harm(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    shutil.move(step_folder(tmp_path, 2) / "actor" / "huggingface", tmp_path / "model")
    (tmp_path / LATEST).write_text("")
    assert auto(tmp_path) == step_folder(tmp_path, 2)


def test_a_named_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    config = TrainerConfig(resume_mode="resume_path", resume_from_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path=.* it is not a folder global_step_N"):
        find_checkpoint(config)


@pytest.mark.parametrize("step", [4, 2], ids=["a new step", "a step that is there already"])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: Any, step: int, number: int) -> None:
    save_steps(tmp_path, 2)
    with killed_at_change(monkeypatch, number) as kills:
        save(make_saver(tmp_path, max_actor_ckpt_to_keep=1), step, FakeRanks(num_bytes=30))
    assert bool(kills) == (number < 6), "the cases cover the whole way, and one more"
    clear_leftovers(tmp_path)
    found = auto(tmp_path)
    assert found is not None and not find_faults(found)
    assert all(name.startswith(("global_step_", "latest_")) and "." not in name[:14] for name in names(tmp_path))
    save_steps(tmp_path, 6, max_actor_ckpt_to_keep=1)
    assert names(tmp_path) == ["global_step_6", LATEST]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    others = ["global_step_3.old", "my_global_step_3.unfinished", "metrics.jsonl"]
    for name in ["global_step_4.unfinished", "global_step_1.deleted", *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "global_step_2", LATEST])


# ------------------------------------------------------------------ saves that fail


def assert_save_failed(root: Path, metrics: dict[str, float], text: str, words: str) -> None:
    assert metrics["training/failed_saves"] == 1
    assert f"could not be written to trainer.default_local_dir={root}" in text
    assert words in text
    assert f"{step_folder(root, 1)} is whole and safe" in text
    assert newest_whole(root) == auto(root) == step_folder(root, 1)
    assert not unfinished_folder(root, 2).exists(), "what was written takes no space"


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, caplog: Any) -> None:
    saver = make_saver(tmp_path)
    save(saver, 1)
    with full_disk(5000):
        metrics = save(saver, 2, FakeRanks(num_bytes=6000))
    assert_save_failed(tmp_path, metrics, caplog.text, "File too large")
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        saver.finish()
    assert save(saver, 3)["training/failed_saves"] == 1
    saver.finish()


def test_a_broken_disk_costs_one_checkpoint(tmp_path: Path, caplog: Any) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as root:
        saver = make_saver(root)
        save(saver, 1, FakeRanks(100_000))
        metrics = save(saver, 2, FakeRanks(600_000))
        assert_save_failed(root, metrics, caplog.text, "No space left on device")
        assert "(0.00 GiB free)" in caplog.text

        saver = make_saver(root)
        remount(root, "ro")
        with caplog.at_level(logging.ERROR):
            metrics = save(saver, 2)
        assert_save_failed(root, metrics, caplog.text, "Read-only file system")
        remount(root, "rw")
        assert save(saver, 3)["training/failed_saves"] == 1
        assert auto(root) == step_folder(root, 3)

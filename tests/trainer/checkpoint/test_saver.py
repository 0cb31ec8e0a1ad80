"""Saving while training: what is in place when, what a failure costs, what a kill leaves."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.file_faults import full_disk, killed_at_change
from support.saving_ranks import DRIVER_STATE, FakeRanks

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.checkpoint import layout
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.layout import LATEST, find_checkpoint, read_manifest, step_folder
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
    ranks.slow = True
    save(saver, 2, ranks)
    save(saver, 3, ranks)  # one at a time
    assert names(tmp_path) == ["global_step_1", "global_step_2", "global_step_3.unfinished", LATEST]
    save(saver, 4, ranks, last=True)
    assert auto(tmp_path) == step_folder(tmp_path, 4)


def test_a_checkpoint_holds_manifest_settings_and_driver_state(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    manifest = read_manifest(step_folder(tmp_path, 4))
    assert manifest["identity"] == {"model": "m"}
    export = "actor/huggingface/model.safetensors"
    assert manifest["files"].keys() == {"actor/shard_0", "actor/shard_1", "config.yaml", "data.pt", export}
    found = DRIVER_STATE | {"metrics": {"training/failed_saves": 0.0}, "other_files": False}
    assert load_driver_state(step_folder(tmp_path, 4), {}) == found


def test_a_saved_driver_state_runs_no_code(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    torch.save({"loader": PPOConfig()}, step_folder(tmp_path, 4) / "data.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_driver_state(step_folder(tmp_path, 4), {})


def test_the_newest_whole_checkpoints_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 6, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:2] == ["global_step_4", "global_step_6"]
    (step_folder(tmp_path, 6) / "data.pt").unlink()
    save_steps(tmp_path, 8, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:3] == ["global_step_4", "global_step_6", "global_step_8"], "step 6 does not count"
    save_steps(tmp_path, 9, max_actor_ckpt_to_keep=2)
    assert names(tmp_path)[:2] == ["global_step_8", "global_step_9"]
    save(make_saver(tmp_path), 9, FakeRanks(num_bytes=20))
    assert read_manifest(step_folder(tmp_path, 9))["files"]["actor/shard_0"] == 20, "a step that is taken again"


# ------------------------------------------------------------------ damage


def of_verl(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "actor" / "model_world_size_2_rank_0.pt")


def of_another_version(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("identity", "facts"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "actor" / "shard_1").write_bytes(b"x" * 9), "actor/shard_1 has 9 of 10 bytes"),
        (lambda folder: (folder / "actor" / "shard_0").unlink(), "actor/shard_0 is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json, so its writing was never finished"),
        (of_verl, r"verl wrote it, its weights are shards .*; merge them .* as actor_rollout_ref\.model\.path"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 4'), r"manifest\.json is damaged"),
        (of_another_version, r"manifest\.json is damaged or of another version"),
        (shutil.rmtree, "it is not there"),
    ],
    ids=["truncated", "missing", "no manifest", "of verl", "damaged manifest", "other version", "gone"],
)
def test_a_whole_checkpoint_replaces_a_damaged_one(tmp_path: Path, caplog: Any, damage: Any, words: str) -> None:
    save_steps(tmp_path, 2, 4)
    damage(step_folder(tmp_path, 4))
    assert auto(tmp_path) == step_folder(tmp_path, 2)
    assert "resuming from the older" in caplog.text
    shutil.rmtree(step_folder(tmp_path, 2))
    named = TrainerConfig(resume_mode="resume_path", resume_from_path=str(step_folder(tmp_path, 4)))
    for config in (named, TrainerConfig(default_local_dir=str(tmp_path))):
        with pytest.raises(ValueError, match=f"resume_mode=disable to start afresh:\n- .*global_step_4.*{words}"):
            find_checkpoint(config)


def test_an_export_may_be_moved_and_a_checkpoint_not_be_renamed(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    shutil.move(step_folder(tmp_path, 2) / "actor" / "huggingface", tmp_path / "model")
    assert auto(tmp_path) == step_folder(tmp_path, 2)
    config = TrainerConfig(resume_mode="resume_path", resume_from_path=str(tmp_path))
    with pytest.raises(ValueError, match="it is not named global_step_N"):
        find_checkpoint(config)
    unread = TrainerConfig(resume_from_path=str(tmp_path), default_local_dir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"is read with trainer.resume_mode=resume_path, and .* has no checkpoint"):
        find_checkpoint(unread)


@pytest.mark.parametrize("step", [4, 2], ids=["a new step", "a step that is there already"])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: Any, step: int, number: int) -> None:
    save_steps(tmp_path, 2)
    with killed_at_change(monkeypatch, number) as kills:
        save(make_saver(tmp_path, max_actor_ckpt_to_keep=1), step, FakeRanks(num_bytes=30))
    assert bool(kills) == (number < 6), "the cases cover the whole way, and one more"
    layout.clear_leftovers(tmp_path)
    found = auto(tmp_path)
    assert found is not None and not layout.find_faults(found)
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob("*.deleted"))
    save_steps(tmp_path, 6, max_actor_ckpt_to_keep=1)
    assert names(tmp_path) == ["global_step_6", LATEST]


def test_a_checkpoint_counts_where_the_one_it_replaces_cannot_be_removed(tmp_path: Path, monkeypatch: Any) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / LATEST).write_text("1\n")  # as a run that goes back to step 1 leaves it

    def cannot(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    saver = make_saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", cannot)
        assert save(saver, 2)["training/failed_saves"] == 0
    assert auto(tmp_path) == step_folder(tmp_path, 2)


def test_a_file_of_the_latest_step_that_holds_none_is_named(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text("step 2\n")
    with pytest.raises(ValueError, match=rf"{LATEST} holds 'step 2', not a step"):
        auto(tmp_path)


def test_without_the_file_of_the_latest_step_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4)
    (tmp_path / LATEST).unlink()  # as where the folders alone were copied
    assert auto(tmp_path) == step_folder(tmp_path, 4)
    assert find_checkpoint(TrainerConfig(default_local_dir=str(tmp_path), resume_mode="disable")) is None


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    others = ["global_step_3.old", "my_global_step_3.unfinished", "metrics.jsonl"]
    for name in ["global_step_4.unfinished", "global_step_1.deleted", *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    layout.clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "global_step_2", LATEST])


# ------------------------------------------------------------------ saves that fail


def test_a_broken_disk_costs_one_checkpoint(tmp_path: Path, caplog: Any) -> None:
    saver = make_saver(tmp_path)
    save(saver, 1, FakeRanks(100_000))
    with full_disk(300_000):
        assert save(saver, 2, FakeRanks(600_000))["training/failed_saves"] == 1
    assert f"could not be written to trainer.default_local_dir={tmp_path}: rank 1: OSError: " in caplog.text
    assert names(tmp_path) == ["global_step_1", LATEST], "what was written takes no space"
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        saver.finish()
    caplog.clear()
    with full_disk(0):  # not even the driver's own part
        assert save(saver, 2)["training/failed_saves"] == 2
    assert f"={tmp_path}: [Errno 27] File too large" in caplog.text
    assert save(saver, 3)["training/failed_saves"] == 2
    assert auto(tmp_path) == step_folder(tmp_path, 3)
    saver.finish()

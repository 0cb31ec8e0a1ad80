"""Saving beside the training: what is in place when, what a failure costs, what a kill leaves."""

import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.file_faults import disk_full_text, remount, small_disk

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.checkpoint.layout import (
    clear_leftovers,
    find_checkpoint,
    newest_whole,
    step_folder,
    unfinished_folder,
)
from verl.trainer.checkpoint.manifest import find_faults, read_manifest
from verl.trainer.checkpoint.saver import CheckpointError, CheckpointSaver
from verl.utils.save_outcome import SaveOutcome


class Ranks:
    """Two ranks that write a file each, when they are told to go on."""

    def __init__(self, num_bytes: int = 10) -> None:
        self.num_bytes = num_bytes
        self.slow = False
        self.folder = Path()

    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        self.folder = Path(local_path)

    def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
        if self.slow and not wait:
            return [SaveOutcome(done=True, seconds=1.0), SaveOutcome(done=False)]
        return [self._write(rank) for rank in range(2)]

    def _write(self, rank: int) -> SaveOutcome:
        try:
            (self.folder / f"shard_{rank}").write_bytes(b"x" * self.num_bytes)
        except OSError as error:
            return SaveOutcome(done=True, error=f"OSError: {error}")
        return SaveOutcome(done=True, seconds=2.0 + rank)


def make_saver(root: Path, **trainer: Any) -> CheckpointSaver:
    settings = {"save_freq": 1, "async_save": False, "n_gpus_per_node": 2} | trainer
    return CheckpointSaver(PPOConfig(trainer=TrainerConfig(default_local_dir=str(root), **settings)), {"model": "m"})


def some_state() -> checkpoint.DataState:
    return checkpoint.DataState(loader={"batch": 3}, epoch=1, prompts=8, batch_size=4, num_workers=0, kl_coef=0.5)


def save(saver: CheckpointSaver, ranks: Ranks, step: int, last: bool = False) -> dict[str, float]:
    return saver.save(ranks, step, some_state(), last=last)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def auto(root: Path) -> Path | None:
    return find_checkpoint(TrainerConfig(default_local_dir=str(root)))


# ------------------------------------------------------------------ when all goes well


def test_a_checkpoint_gets_its_name_when_every_rank_is_done(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, async_save=True), Ranks()
    ranks.slow = True
    metrics = save(saver, ranks, 1)
    assert metrics["training/failed_saves"] == 0
    assert metrics["timing_s/save_checkpoint"] > 0
    assert "timing_s/save_checkpoint/write" not in metrics
    assert names(tmp_path) == ["global_step_1.unfinished"]
    assert saver.poll() == {"training/failed_saves": 0}
    assert auto(tmp_path) is None
    ranks.slow = False
    metrics = saver.poll()
    assert metrics["timing_s/save_checkpoint/write"] == 3.0, "the slowest rank's"
    assert names(tmp_path) == ["global_step_1", "latest_checkpointed_iteration.txt"]
    assert auto(tmp_path) == step_folder(tmp_path, 1)
    assert saver.poll() == {"training/failed_saves": 0}


def test_one_checkpoint_is_written_at_a_time_and_the_last_is_waited_for(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, async_save=True), Ranks()
    ranks.slow = True
    save(saver, ranks, 1)
    save(saver, ranks, 2)
    assert names(tmp_path)[:2] == ["global_step_1", "global_step_2.unfinished"]
    save(saver, ranks, 3, last=True)
    assert auto(tmp_path) == step_folder(tmp_path, 3)
    saver.finish()


def test_a_checkpoint_says_what_it_is_and_holds(tmp_path: Path) -> None:
    save(make_saver(tmp_path), Ranks(), 4)
    folder = step_folder(tmp_path, 4)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.facts) == (4, 2, {"model": "m"})
    assert manifest.files.keys() == {"actor/shard_0", "actor/shard_1", "config.yaml", "data.pt"}
    kept = replace(some_state(), figures={"training/failed_saves": 0.0})
    assert checkpoint.load_data_state(folder, some_state(), may_differ=False) == kept


def test_a_saved_data_position_runs_no_code(tmp_path: Path) -> None:
    save(make_saver(tmp_path), Ranks(), 4)
    folder = step_folder(tmp_path, 4)
    torch.save({"loader": PPOConfig()}, folder / "data.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load_data_state(folder, some_state(), may_differ=False)


def test_the_newest_stay(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, max_actor_ckpt_to_keep=2), Ranks()
    for step in (2, 4, 6):
        save(saver, ranks, step)
    assert names(tmp_path)[:2] == ["global_step_4", "global_step_6"]


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, max_actor_ckpt_to_keep=2), Ranks()
    save(saver, ranks, 2)
    save(saver, ranks, 4)
    (step_folder(tmp_path, 4) / "data.pt").unlink()
    save(saver, ranks, 6)
    assert {"global_step_2", "global_step_6"} <= set(names(tmp_path)), "step 2 is the second newest whole one"
    save(saver, ranks, 8)
    assert names(tmp_path)[:2] == ["global_step_6", "global_step_8"]


def test_a_step_that_is_taken_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(make_saver(tmp_path), Ranks(num_bytes=10), 2)
    save(make_saver(tmp_path), Ranks(num_bytes=20), 2)
    assert read_manifest(step_folder(tmp_path, 2)).files["actor/shard_0"] == 20
    assert names(tmp_path) == ["global_step_2", "latest_checkpointed_iteration.txt"]


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "actor" / "shard_1").write_bytes(b"x" * 9), "actor/shard_1 has 9 of 10 bytes"),
        (lambda folder: (folder / "actor" / "shard_0").unlink(), "actor/shard_0 is missing"),
        (lambda folder: (folder / "data.pt").write_bytes(b""), r"data\.pt has 0 of \d+ bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json, so its writing was never finished"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 4'), r"manifest\.json is damaged"),
        (shutil.rmtree, "it is not there"),
    ],
    ids=["truncated shard", "missing shard", "empty data state", "no manifest", "damaged manifest", "gone"],
)
def test_the_newest_whole_checkpoint_stands_in_for_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, words: str
) -> None:
    saver, ranks = make_saver(tmp_path), Ranks()
    save(saver, ranks, 2)
    save(saver, ranks, 4)
    damage(step_folder(tmp_path, 4))
    assert auto(tmp_path) == step_folder(tmp_path, 2)
    with pytest.raises(ValueError, match=f"trainer.resume_from_path=.*global_step_4.*{words}"):
        find_checkpoint(TrainerConfig(resume_mode="resume_path", resume_from_path=str(step_folder(tmp_path, 4))))
    shutil.rmtree(step_folder(tmp_path, 2))
    with pytest.raises(ValueError, match=f"resume_mode=disable to start afresh:\n- .*global_step_4.*{words}"):
        auto(tmp_path)
    assert "resuming from the older" in caplog.text


def test_an_export_may_be_moved_out_of_a_checkpoint(tmp_path: Path) -> None:
    saver, ranks = make_saver(tmp_path, async_save=True), Ranks()
    save(saver, ranks, 2)
    export = unfinished_folder(tmp_path, 2) / "actor" / "huggingface"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    saver.finish()
    shutil.move(step_folder(tmp_path, 2) / "actor" / "huggingface", tmp_path / "model")
    assert auto(tmp_path) == step_folder(tmp_path, 2)


def test_a_garbled_latest_file_costs_nothing(tmp_path: Path) -> None:
    save(make_saver(tmp_path), Ranks(), 2)
    (tmp_path / checkpoint.LATEST).write_text("")
    assert auto(tmp_path) == step_folder(tmp_path, 2)


def test_a_named_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    config = TrainerConfig(resume_mode="resume_path", resume_from_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path"):
        find_checkpoint(config)


class Killed(BaseException):
    """The process ends here."""


def kill_at_each_change(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End the process before the n-th rename or removal of a folder from now."""
    done = [0]

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[0] += 1
            if done[0] == number:
                raise Killed
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("step", [4, 2], ids=["a new step", "a step that is there already"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    save(make_saver(tmp_path), Ranks(), 2)
    with monkeypatch.context() as patch:
        kill_at_each_change(patch, number)
        try:
            save(make_saver(tmp_path, max_actor_ckpt_to_keep=1), Ranks(num_bytes=30), step)
        except Killed:
            killed = True
        else:
            killed = False
    assert killed or number > 5, "the whole way is covered"
    clear_leftovers(tmp_path)
    found = auto(tmp_path)
    assert found is not None and not find_faults(found)
    assert all(name.startswith(("global_step_", "latest_")) and "." not in name[:14] for name in names(tmp_path))
    saver = make_saver(tmp_path, max_actor_ckpt_to_keep=1)
    save(saver, Ranks(), 6)
    assert names(tmp_path) == ["global_step_6", "latest_checkpointed_iteration.txt"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(make_saver(tmp_path), Ranks(), 2)
    others = ["global_step_3.old", "my_global_step_3.unfinished", "metrics.jsonl"]
    for name in ["global_step_4.unfinished", "global_step_1.deleted", *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "global_step_2", "latest_checkpointed_iteration.txt"])


# ------------------------------------------------------------------ saves that fail


def check_failed(saver: CheckpointSaver, root: Path, metrics: dict[str, float], text: str, words: str) -> None:
    assert metrics["training/failed_saves"] == 1
    assert f"could not be written to trainer.default_local_dir={root}" in text
    assert words in text
    assert f"{step_folder(root, 1)} is whole and safe" in text
    assert newest_whole(root) == auto(root) == step_folder(root, 1)
    assert not unfinished_folder(root, 2).exists(), "what was written takes no room"


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = make_saver(tmp_path)
    save(saver, Ranks(), 1)
    with disk_full_text(5000):
        metrics = save(saver, Ranks(num_bytes=6000), 2)
    check_failed(saver, tmp_path, metrics, caplog.text, "File too large")
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        saver.finish()
    assert save(saver, Ranks(), 3)["training/failed_saves"] == 1
    saver.finish()


def test_a_small_disk_that_fills_up_costs_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as root:
        saver = make_saver(root)
        save(saver, Ranks(100_000), 1)
        metrics = save(saver, Ranks(600_000), 2)
        check_failed(saver, root, metrics, caplog.text, "No space left on device")
        assert "(0.00 GiB free)" in caplog.text
        assert save(saver, Ranks(100_000), 3)["training/failed_saves"] == 1
        assert auto(root) == step_folder(root, 3)


def test_a_folder_that_became_read_only_costs_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as root:
        saver = make_saver(root)
        save(saver, Ranks(), 1)
        remount(root, "ro")
        with caplog.at_level(logging.ERROR):
            metrics = save(saver, Ranks(), 2)
        check_failed(saver, root, metrics, caplog.text, "Read-only file system")
        remount(root, "rw")
        save(saver, Ranks(), 3)
        assert auto(root) == step_folder(root, 3)

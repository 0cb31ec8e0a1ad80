"""The best checkpoint: which it is, that it stays, and that a kill or a resume does not make it another."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.file_faults import killed_at_change
from support.saving_ranks import DRIVER_STATE, FakeRanks

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.checkpoint import layout
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.saver import CheckpointSaver

RULE = "general subject to rec >= 0.9 of step 0"


class Run:
    """The part of a trainer's loop that has to do with validations and checkpoints."""

    def __init__(self, root: Path, save_every: int = 100, **trainer: Any) -> None:
        settings = {"best_metric": RULE, "test_freq": 1, "async_save": False, "max_actor_ckpt_to_keep": 1} | trainer
        config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(root), **settings))
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.save_every, self.ranks = root, save_every, FakeRanks()
        if config.trainer.resume_mode != "disable":
            layout.clear_leftovers(root)
        folder = layout.find_checkpoint(config.trainer)
        self.step = 0 if folder is None else layout.checkpoint_step(folder)
        self.best = BestCheckpoint(config.trainer, folder)
        self.saver = CheckpointSaver(config, {}, self.best)
        self.best.update_files()

    def start(self, general: float = 0.1, rec: float = 0.5) -> "Run":
        self.best.note(0, {"general": general, "rec": rec})
        return self

    def take(self, general: float, rec: float = 0.5) -> dict[str, float]:
        """A step with a validation; its metrics."""
        self.step += 1
        metrics = self.best.note(self.step, {"general": general, "rec": rec})
        if self.step % self.save_every == 0 or self.best.is_new(self.step):
            return metrics | self.saver.save(self.ranks, self.step, DRIVER_STATE, last=False)
        return metrics | self.saver.poll()

    @property
    def checkpoints(self) -> list[int]:
        return sorted(layout.checkpoint_step(path) for path in layout.step_folders(self.root))


def assert_best(run: Run, step: int) -> None:
    """Reason and model are those of one step."""
    assert json.loads((run.root / "best/best.json").read_text())["step"] == step
    assert (run.root / "best/huggingface/model.safetensors").read_text() == f"weights of step {step}"


def resume_path(folder: Path) -> dict[str, str]:
    return {"resume_mode": "resume_path", "resume_from_path": str(folder)}


def test_the_best_that_keeps_the_bound_stays_beside_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every=2).start()
    assert run.saver.written_folders() == {}
    assert run.take(0.5)["training/best_step"] == 1  # no checkpoint is due at step 1
    assert run.checkpoints == [1]
    run.take(0.9, rec=0.44)  # better, but 0.44 is below 0.9 x 0.5
    assert run.checkpoints == [1, 2], "the newest, and the best"
    metrics = run.take(0.7, rec=0.45)
    assert (metrics["training/best_step"], metrics["training/best_value"]) == (3, 0.7)
    assert run.checkpoints == [3]
    for general in (0.6, 0.7, 0.2):
        assert run.take(general)["training/best_step"] == 3, "of equals the first"
    assert run.checkpoints == [3, 6]
    left = {"last_checkpoint": f"{tmp_path}/global_step_6", "best_model": f"{tmp_path}/best/huggingface"}
    assert run.saver.written_folders() == left
    assert_best(run, 3)
    reason = json.loads((tmp_path / "best" / "best.json").read_text())
    assert (reason["checkpoint"], reason["rule"], reason["value"]) == ("global_step_3", RULE, 0.7)
    assert reason["reason"] == "general 0.7; rec 0.45, bound >= 0.45 = 0.9 of step 0"
    assert reason["metrics_of_step_0"] == {"general": 0.1, "rec": 0.5}


def test_the_model_is_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path).start()
    run.take(0.5)
    name = "huggingface/model.safetensors"
    assert os.path.samefile(tmp_path / "best" / name, tmp_path / "global_step_1" / "actor" / name)

    def link(*_: Any) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", link)
    run.take(0.6)
    assert_best(run, 2)


def test_the_model_waits_for_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, async_save=True).start()
    run.take(0.5)
    run.saver.poll()
    run.ranks.slow = True
    assert run.take(0.6)["training/best_step"] == 2
    assert_best(run, 1)
    assert run.take(0.55)["training/best_step"] == 2, "worse than what is being written"
    run.ranks.slow, run.ranks.error = False, "disk full"
    run.saver.poll()
    assert_best(run, 1)
    run.ranks.error = ""
    assert run.take(0.52)["training/best_step"] == 4, "better than those that were written"
    run.saver.poll()
    assert_best(run, 4)


def test_a_resumed_run_continues_with_its_best_and_its_step_0(tmp_path: Path) -> None:
    first = Run(tmp_path, save_every=3).start()
    for general in (0.2, 0.8, 0.3):
        first.take(general)
    assert first.checkpoints == [2, 3]
    second = Run(tmp_path, save_every=3)
    assert second.step == 3
    second.best.note(3, {"general": 0.3, "rec": 0.5})  # the validation before training
    assert second.take(0.9, rec=0.44)["training/best_step"] == 2, "below the bound that step 0 gave"
    second.take(0.5)
    assert second.take(0.6)["training/best_step"] == 2
    assert second.checkpoints == [2, 6]
    assert_best(second, 2)


def test_steps_that_are_taken_again_are_forgotten(tmp_path: Path) -> None:
    first = Run(tmp_path, max_actor_ckpt_to_keep=None).start()
    for general in (0.4, 0.6, 0.8):
        first.take(general)
    assert_best(first, 3)
    (tmp_path / "global_step_3/actor/huggingface/model.safetensors").write_text("what is taken again")
    again = Run(tmp_path, max_actor_ckpt_to_keep=None, **resume_path(tmp_path / "global_step_2"))
    assert again.take(0.7)["training/best_step"] == 3
    assert_best(again, 3)
    second = Run(tmp_path, max_actor_ckpt_to_keep=None, **resume_path(tmp_path / "global_step_2"))
    assert_best(second, 2)
    assert second.take(0.5)["training/best_step"] == 2, "0.8 of the step that was taken before is forgotten"
    third = Run(tmp_path, resume_mode="disable", max_actor_ckpt_to_keep=None)
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "best_void" / "huggingface" / "model.safetensors").read_text() == "weights of step 2"
    assert third.start().take(0.3)["training/best_step"] == 1
    assert third.saver.written_folders()["last_checkpoint"] == f"{tmp_path}/global_step_1", "3 is of the run before"
    assert_best(third, 1)


def test_a_run_elsewhere_takes_step_0_from_the_run_it_resumes(tmp_path: Path) -> None:
    Run(tmp_path / "a").start().take(0.5)
    Run(tmp_path / "b").start().take(0.9)
    run = Run(tmp_path / "b", **resume_path(tmp_path / "a" / "global_step_1"))
    assert not (tmp_path / "b" / "best").exists() and (tmp_path / "b" / "best_void").exists()
    assert run.take(0.4, rec=0.44) == {"training/failed_saves": 0}, "no candidate here, and the bound is known"
    assert run.take(0.4)["training/best_step"] == 3
    assert_best(run, 3)


def test_step_0_has_to_be_known(tmp_path: Path) -> None:
    Run(tmp_path, best_metric="general").start().take(0.5)
    (tmp_path / "validations.json").unlink()
    with pytest.raises(ValueError, match=r"compares rec with step 0, .*global_step_1 did not record .*resume_mode="):
        Run(tmp_path)
    Run(tmp_path, best_metric="general subject to rec >= 0.4")
    (tmp_path / "validations.json").write_text('{"0": ')
    with pytest.raises(ValueError, match=r"validations\.json is not JSON: .*; removing it forgets"):
        Run(tmp_path)


def test_a_model_outlives_its_checkpoint(tmp_path: Path) -> None:
    """Whoever frees space by hand does not lose the best model to a worse one."""
    first = Run(tmp_path, save_every=2, max_actor_ckpt_to_keep=None).start()
    first.take(0.8)
    first.take(0.4)
    shutil.rmtree(tmp_path / "global_step_1")
    second = Run(tmp_path, save_every=2, max_actor_ckpt_to_keep=None)
    second.take(0.5)
    second.take(0.6)
    assert_best(second, 1)


@pytest.mark.parametrize("number", range(1, 15))
def test_a_kill_leaves_a_best_that_is_there(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    """Step 2 is better than step 1, and step 1 must go only when all of step 2 is in place."""
    first = Run(tmp_path).start()
    first.take(0.5)
    with killed_at_change(monkeypatch, number) as kills:
        first.take(0.6)
    assert bool(kills) == (number < 14), "the cases cover the whole way, and one more"
    second = Run(tmp_path)
    assert second.step in (1, 2)
    assert_best(second, second.step)
    second.take(0.7)
    assert_best(second, second.step)
    assert second.checkpoints == [second.step]


def test_a_full_disk_costs_neither_the_run_nor_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_every=1).start()
    run.take(0.5)

    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(BestCheckpoint, "_export_best", full)
        run.take(0.6)
        run.take(0.1)
        assert run.checkpoints == [1, 2, 3], "the one of best/, the best, the newest"
        assert_best(run, 1)
    run.take(0.1)
    assert_best(run, 2)


def test_validations_without_a_better_one_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, stop_after_no_better=2).start()
    ended = []
    for general in (0.5, 0.4, 0.6, 0.5, 0.6):
        run.take(general)
        ended.append(run.best.gives_up())
    assert ended == [False, False, False, False, True]
    assert not Run(tmp_path / "other").start().best.gives_up(), "never unless it is asked for"


def test_without_a_rule_nothing_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path, best_metric=None).start()
    assert run.take(0.5) == {}
    assert list(tmp_path.iterdir()) == []
    assert run.best.describe() == ""

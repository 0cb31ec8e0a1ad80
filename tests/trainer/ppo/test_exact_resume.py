"""A run that was killed and resumed is the run that never was: the same figures at every step, the same weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from e2e.launch import write_onerec_parquet
from in_process_run import run_in_process
from safetensors.torch import load_file

from verl.trainer.config import PPOConfig
from verl.trainer.config.typed import load_config

STEPS = 5
MEASURED = ("timing", "perf/")
"""Beginnings of the names of figures that are measured by the clock."""


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def settings(pair: Any, train: Path, folder: Path, **changes: Any) -> PPOConfig:
    values = {
        "actor_rollout_ref.model.path": pair.student,
        "actor_rollout_ref.ref.model.path": pair.teacher,
        "actor_rollout_ref.rollout.extend_vocab_start_token": pair.extend_vocab_start_token,
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "algorithm.adv_estimator": "on_policy_distill",
        "data.train_files": train,
        "data.cache_dir": train.parent / "cache",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 64,
        "data.max_response_length": 8,
        "data.enable_think": True,
        "trainer.default_local_dir": folder,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 1,
        "trainer.val_before_train": False,
        "trainer.logger": "[file]",
        **changes,
    }
    return load_config([f"{key}={value}" for key, value in values.items()])


def figures(folder: Path) -> list[dict[str, Any]]:
    """What was logged of each step, in order, without what the clock says; every step once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [{k: v for k, v in line["data"].items() if not k.startswith(MEASURED)} for line in lines]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Nine prompts: two batches an epoch, and one prompt too many."""
    return write_onerec_parquet(tmp_path / "train.parquet", 9)


def test_a_killed_and_resumed_run_is_the_run_that_never_was(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(settings(tiny_pair, train, whole))
    run_in_process(settings(tiny_pair, train, stopped), dies_in_batch=3)  # while the second checkpoint is written
    assert (stopped / "global_step_2.unfinished").exists()
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    run_in_process(settings(tiny_pair, train, stopped), dies_in_batch=4)  # at the end of the second epoch
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    run_in_process(settings(tiny_pair, train, stopped, **{"trainer.async_save": False}))

    expected = figures(whole)
    assert figures(stopped) == expected
    assert len(expected[0]) > 40
    assert {step["training/epoch"] for step in expected} == {0, 1, 2}
    assert len({step["actor/lr"] for step in expected}) == STEPS
    last = f"global_step_{STEPS}/actor/huggingface/model.safetensors"
    weights = load_file(whole / last)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(stopped / last).items())
    void = [json.loads(line)["step"] for line in (stopped / "metrics_void.jsonl").read_text().splitlines()]
    assert void == [2, 4], "what was logged of steps whose checkpoints the kills cost"


def test_a_checkpoint_of_another_run_is_refused_before_anything_starts(
    tiny_pair: Any, train: Path, tmp_path: Path
) -> None:
    run_in_process(settings(tiny_pair, train, tmp_path / "run"), dies_in_batch=3)
    changes = {
        "actor_rollout_ref.model.path": tiny_pair.teacher,
        "actor_rollout_ref.rollout.extend_vocab_start_token": "null",
        "algorithm.distill_adv_max_clip": 5.0,
    }
    with pytest.raises(ValueError, match="trained otherwise") as refusal:
        run_in_process(settings(tiny_pair, train, tmp_path / "run", **changes))
    text = str(refusal.value)
    assert "- student.weights: " in text
    assert "- student.tokenizer: " in text
    assert "- actor_rollout_ref.rollout.extend_vocab_start_token: " in text
    assert "- algorithm.distill_adv_max_clip: null in the checkpoint, 5.0 now" in text


def test_a_run_in_one_process_has_one_rank(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.n_gpus_per_node=2"):
        run_in_process(settings(tiny_pair, train, tmp_path / "run", **{"trainer.n_gpus_per_node": 2}))

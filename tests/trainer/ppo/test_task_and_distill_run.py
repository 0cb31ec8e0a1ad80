"""Whole runs with a task reward beside distillation, and the best checkpoint of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import run_in_process, settings
from support.launch import write_onerec_parquet

from verl.config import PPOConfig

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 4
REWARD = """
import numpy as np

async def compute_score(data_source, solution_str, ground_truth, extra_info=None, at_most=1):
    assert 0 < extra_info["response_length"] <= 8
    return {"score": len(set(solution_str)) / at_most, "acc": np.bool_("a" in solution_str), "pred": solution_str[:1]}
"""


def mixed(pair: Any, folder: Path) -> PPOConfig:
    """Settings of a run over two sources, the second of which belongs to the frozen student."""
    train = write_onerec_parquet(folder / "train.parquet", 8, sources=("general", "rec_next"))
    (folder / "reward.py").write_text(REWARD)
    values = {
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "algorithm.adv_estimator": "grpo",
        "algorithm.distill.coef": 0.5,
        "algorithm.distill_adv_min_clip": -30,
        "algorithm.distill_adv_max_clip": 5,
        "++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*],weight:0.5}",
        "actor_rollout_ref.rollout.val_kwargs.n": 2,
        "custom_reward_function.path": folder / "reward.py",
        "custom_reward_function.reward_kwargs.at_most": 8,
        "trainer.validation_data_dir": folder / "answers",
        "data.val_files": train,
        "data.enable_think": False,
        "trainer.best_metric": "val/general/reward subject to val/*/reward >= 0.01 of step 0",
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.save_freq": 2,
        "trainer.test_freq": 1,
        "trainer.total_training_steps": STEPS,
        "trainer.val_before_train": True,
    }
    return settings(pair, train, folder / "run", **values)


def test_the_best_of_a_run_is_found_again_after_a_kill(tiny_pair: Any, tmp_path: Path) -> None:
    # The start, then two batches a step: it dies in step 4.
    run_in_process(mixed(tiny_pair, tmp_path), dies_in_batch=8)
    run_in_process(mixed(tiny_pair, tmp_path))
    folder = tmp_path / "run"
    record = {int(step): metrics for step, metrics in json.loads((folder / "validations.json").read_text()).items()}
    assert sorted(record) == list(range(STEPS + 1))
    values = {step: metrics["val/general/reward"] for step, metrics in record.items() if step}
    expected = min(step for step in values if values[step] == max(values.values()))
    why = json.loads((folder / "best" / "best.json").read_text())
    assert (why["step"], why["value"]) == (expected, values[expected])
    assert {path.name for path in folder.glob("global_step_*")} == {f"global_step_{expected}", f"global_step_{STEPS}"}
    steps = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [data for data in steps if "actor/loss" in data]
    assert steps[-1]["training/best_step"] == expected and len(steps) == STEPS
    for data in steps:
        assert data["critic/rewards/max"] > 0 and 0 < data["advantage/distill_share"] < 1
        assert data["advantage/rec_next/task_abs"] > 0 and data["advantage_teacher/ref/distill_abs"] > 0
        assert data["actor/grad_norm"] > 0 and data["actor/skipped_updates"] == 0
    answers = [json.loads(line) for line in (folder.parent / "answers" / f"{STEPS}.jsonl").read_text().splitlines()]
    for source in ("general", "rec_next"):
        right = [answer["acc"] for answer in answers if answer["source"] == source]
        assert len(right) == 8 and steps[-1][f"val-core/{source}/acc/mean@2"] == sum(right) / 8
        assert f"val-core/{source}/acc/maj@2/mean" in steps[-1] and f"reward_extra/{source}/acc" in steps[-1]
    assert steps[0]["distill_teacher/self/reverse_kl"] == pytest.approx(0, abs=1e-4), "it is the student itself"
    assert abs(steps[-1]["distill_teacher/self/reverse_kl"]) > 1e-4
    assert steps[0]["distill_teacher/ref/reverse_kl"] > 0.01
    kept = load_file(folder / "best" / "huggingface" / "model.safetensors")
    of_step = load_file(folder / f"global_step_{expected}" / "actor" / "huggingface" / "model.safetensors")
    assert all(torch.equal(value, of_step[name]) for name, value in kept.items())

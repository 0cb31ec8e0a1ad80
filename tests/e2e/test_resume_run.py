"""Whole runs that stop and go on, through the launch script, and what is exported from them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import PLAIN, ReplicaProcess, generate, largest_difference
from support.launch import launch, metrics_by_step, script_env, small_run, write_onerec_parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl import model_merger
from verl.config import HFModelConfig, RolloutConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 4


def settings(ranks: int, **changes: Any) -> list[str]:
    return small_run("vllm", ranks, STEPS, **changes)


def test_a_resumed_run_equals_a_whole_one_on_as_many_ranks_or_fewer_and_is_exported(
    tiny_pair: Any, tmp_path: Path
) -> None:
    env = script_env(tiny_pair, write_onerec_parquet(tmp_path / "train.parquet", 18))
    whole = launch(tmp_path / "whole", settings(2), env)
    launch(tmp_path / "halves", settings(2, **{"trainer.total_training_steps": 2}), env)
    shutil.copytree(tmp_path / "halves", tmp_path / "fewer")
    halves, fewer = launch(tmp_path / "halves", settings(2), env), launch(tmp_path / "fewer", settings(1), env)
    assert "resumed from" in halves.output
    assert "trainer.n_gpus_per_node: 2 in the checkpoint, 1 now" in fewer.output
    expected, same, near = (metrics_by_step(each.folder, STEPS) for each in (whole, halves, fewer))
    for step in expected:
        assert same[step] == pytest.approx(expected[step], rel=1e-6, abs=1e-6), f"step {step}"
        for key in ("distill/reverse_kl", "actor/pg_loss", "actor/grad_norm", "actor/lr", "response_length/mean"):
            assert near[step][key] == pytest.approx(expected[step][key], rel=1e-5, abs=1e-6), f"step {step}: {key}"
    assert halves.series("distill/teacher_canary") == pytest.approx([0, 0], abs=1e-5), "of both ranks, at both halves"
    assert (halves.folder / "config.1.yaml").is_file(), "the first half's settings"
    check_export(whole.folder / f"global_step_{STEPS}", tmp_path / "model")


def check_export(checkpoint: Path, target: Path) -> None:
    """vLLM and transformers load what the shards of two ranks became, and agree on it."""
    assert model_merger.main(["merge", "--local_dir", str(checkpoint / "actor"), "--target_dir", str(target)]) == 0
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    config = RolloutConfig(prompt_length=64, response_length=16, cpu_kvcache_space_gb=0.1)
    engine = ReplicaProcess(config, HFModelConfig(path=str(target)))
    prompts = [tokenizer.encode("copy 1 and 7"), tokenizer.encode("sort 3 and 21")]
    try:
        outputs = engine.run(generate, prompts, {**PLAIN, "max_tokens": 16, "seed": 1})
    finally:
        engine.close()
    assert largest_difference(model, len(tokenizer), prompts, PLAIN, outputs) < 1e-4

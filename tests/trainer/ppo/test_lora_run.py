"""A run whose student has an adapter: its engine samples from the merged weights, and a kill costs nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import run_in_process, settings
from support.launch import MEASURED, metrics_by_step, series, write_onerec_parquet

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 3
CHANGES = {
    "actor_rollout_ref.model.lora_rank": 4,
    "actor_rollout_ref.model.lora_alpha": 32,
    "actor_rollout_ref.actor.optim.lr": 1e-2,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "algorithm.distill.objective": "exact",
    "++algorithm.distill.teachers.self": "{sources: [rec_*]}",
    "trainer.total_training_steps": STEPS,
}


def test_the_engine_has_what_was_trained_and_a_resumed_run_is_the_same(tiny_pair: Any, tmp_path: Path) -> None:
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 9, sources=("general", "rec_next"))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(settings(tiny_pair, prompts, whole, **CHANGES))
    run_in_process(settings(tiny_pair, prompts, stopped, **CHANGES), dies_in_batch=3)
    run_in_process(settings(tiny_pair, prompts, stopped, **CHANGES))

    expected, found = (metrics_by_step(folder, STEPS, MEASURED) for folder in (whole, stopped))
    assert found == expected
    for logged in expected.values():
        assert logged["distill/engine_gap"] < 1e-4 and logged["actor/updates"] == 2
        assert logged["distill/teacher_canary"] == logged["actor/shared_row_drift"] == 0
    before = load_file(tiny_pair.student / "model.safetensors")
    after, again = (load_file(f / f"global_step_{STEPS}/actor/huggingface/model.safetensors") for f in (whole, stopped))
    assert after.keys() == before.keys() and all(torch.equal(value, again[name]) for name, value in after.items())
    same = {name.split(".")[-2] for name, value in after.items() if torch.equal(value, before[name])}
    assert "embed_tokens" in same and not {"q_proj", "down_proj"} & same
    with pytest.raises(ValueError, match=r"model\.lora_rank: 4 in the checkpoint, 8 now"):
        run_in_process(settings(tiny_pair, prompts, whole, **CHANGES | {"actor_rollout_ref.model.lora_rank": 8}))


def test_an_engine_without_the_adapter_would_be_seen(tiny_pair: Any, tmp_path: Path) -> None:
    def send_base_weights(trainer: Any) -> None:
        trainer.actor_wg._worker._exporter._merge = lambda name, weight: weight

    prompts = write_onerec_parquet(tmp_path / "train.parquet", 9, sources=("general", "rec_next"))
    config = settings(tiny_pair, prompts, tmp_path / "run", **CHANGES | {"trainer.total_training_steps": 2})
    run_in_process(config, tamper=send_base_weights)
    first, second = series(tmp_path / "run", "distill/engine_gap")
    assert first < 1e-4 and second > 1e-2

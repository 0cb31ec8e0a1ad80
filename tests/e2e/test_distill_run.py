"""Whole runs: real Ray, real FSDP2, real engines, tiny models."""

import json
from pathlib import Path

import pytest
from support.launch import Run, launch, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import make_pair

STEPS = 12


@pytest.fixture(scope="module")
def vllm_run(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks with vLLM rollouts, through the launch script; the lm head is tied to the embedding."""
    folder = tmp_path_factory.mktemp("vllm_run")
    pair = make_pair(*tiny_tokenizers, folder / "pair", tied=True)
    train = write_onerec_parquet(folder / "train.parquet", 16 * STEPS)
    changes = {
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "actor_rollout_ref.rollout.weight_sync_bucket_mb": 1,
        "data.max_response_length": 32,
        "data.train_batch_size": 16,
        "data.val_files": write_onerec_parquet(folder / "val.parquet", 64),
        "trainer.rollout_data_dir": folder / "rollouts",
        "trainer.save_freq": -1,
        "trainer.test_freq": STEPS,
        "trainer.val_before_train": True,
    }
    overrides = small_run("vllm", 2, STEPS, **changes)
    run = launch(folder / "run", overrides, {**script_env(pair, train), "EXTEND_VOCAB_START_TOKEN": "auto"})
    resolved = f"extend_vocab_start_token: {pair.extend_vocab_start_token}\n"
    assert resolved in (run.folder / "config.yaml").read_text(), "auto is resolved once, at the start"
    return run


def test_reverse_kl_on_held_out_prompts_falls(vllm_run: Run) -> None:
    before, after = vllm_run.series("val/reverse_kl")
    assert after < 0.8 * before


def test_engine_samples_from_the_policy_that_is_trained(vllm_run: Run) -> None:
    # The sampler's log-probs and the trainer's belong to the same tokens and weights at every step.
    gaps = vllm_run.series("training/rollout_log_probs_diff_max")
    assert len(gaps) == STEPS and max(gaps) < 1e-4


def test_rollouts_are_dumped(vllm_run: Run) -> None:
    files = sorted((vllm_run.folder.parent / "rollouts").glob("*.jsonl"))
    assert len(files) == STEPS
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 16 and {row["data_source"] for row in rows} == {"letters", "sums"}


@pytest.mark.slow
def test_real_tokenizers_and_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    """Two steps at V = 176,384 rows with the real Qwen3 and OneRec tokenizers."""
    tokenizers = shared_data / "tokenizer"
    pair = make_pair(tokenizers / "qwen3", tokenizers / "qwen3-onerec", tmp_path / "pair")
    assert pair.extend_vocab_start_token == 151669
    train = shared_data / "onerec" / "train" / "sft_general.parquet"
    overrides = small_run("vllm", 2, 2, **{"data.max_prompt_length": 256})
    run = launch(tmp_path / "run", overrides, script_env(pair, train), timeout_s=900)
    assert sorted(run.metrics) == [1, 2]

"""Whole runs through the launch script: real Ray, real FSDP2, real engines, tiny models."""

import json
from pathlib import Path

import pytest
from support.launch import Run, launch, script_env, write_onerec_parquet
from support.tiny_pairs import Pair, make_pair

SIZES = [
    "data.max_prompt_length=64",
    "data.max_response_length=32",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=2048",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=2048",
]


@pytest.fixture(scope="module")
def vllm_run(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps on two ranks with vLLM rollouts, through the launch script."""
    folder = tmp_path_factory.mktemp("vllm_run")
    train = write_onerec_parquet(folder / "train.parquet", 320)
    val = write_onerec_parquet(folder / "val.parquet", 64)
    overrides = [
        *SIZES,
        f"data.val_files={val}",
        "data.train_batch_size=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.optim.lr=3e-4",
        "actor_rollout_ref.rollout.name=vllm",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=20",
        "trainer.test_freq=10",
        "trainer.val_before_train=True",
        "trainer.logger=[console,file]",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
    ]
    run = launch(folder / "run", overrides, script_env(tiny_pair, train))
    assert run.returncode == 0, run.output[-6000:]
    return run


def test_reverse_kl_on_held_out_prompts_falls(vllm_run: Run) -> None:
    reverse_kl = vllm_run.series("val/reverse_kl")
    assert len(reverse_kl) == 3, "before training, at step 10, at step 20"
    assert reverse_kl[-1] < 0.8 * reverse_kl[0]


def test_engine_samples_from_the_policy_that_is_trained(vllm_run: Run) -> None:
    # The sampler's log-probs and the trainer's belong to the same tokens and weights at every step.
    gaps = vllm_run.series("training/rollout_log_probs_diff_max")
    assert len(gaps) == 20
    assert max(gaps) < 1e-4
    assert vllm_run.series("distill/engine_gap") == vllm_run.series("training/rollout_log_probs_diff_mean")
    assert sum(vllm_run.series("distill/engine_gap_exceeded")) == 0


def test_a_head_tied_to_the_embedding_is_synced_too(
    tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tied_run")
    pair = make_pair(*tiny_tokenizers, folder / "pair", "--hidden", "64", "--tied")
    train = write_onerec_parquet(folder / "train.parquet", 48)
    overrides = [
        *SIZES,
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.weight_sync_bucket_mb=1",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=6",
        "trainer.logger=[file]",
    ]
    run = launch(folder / "run", overrides, {**script_env(pair, train), "EXTEND_VOCAB_START_TOKEN": "auto"})
    assert run.returncode == 0, run.output[-6000:]
    saved = (run.folder / "config.yaml").read_text()
    assert f"extend_vocab_start_token: {pair.extend_vocab_start_token}\n" in saved, "auto is settled once, at the start"
    gaps = run.series("training/rollout_log_probs_diff_max")
    assert len(gaps) == 6, "the last of them after five updates"
    assert max(gaps) < 1e-4


def test_every_step_logs_the_families_of_metrics(vllm_run: Run) -> None:
    data = vllm_run.metrics[20]
    for key in (
        "actor/pg_loss",
        "actor/grad_norm",
        "actor/lr",
        "critic/advantages/mean",
        "response_length/mean",
        "timing_s/step",
        "timing_s/gen",
        "perf/throughput",
        "distill/reverse_kl",
        "distill/extend_mass",
        "distill/extend_seq_ratio",
        "distill/letters/reverse_kl",
        "distill/sums/reverse_kl",
        "val/letters/reverse_kl",
    ):
        assert key in data, key
    assert sorted(step for step in vllm_run.metrics if step) == list(range(1, 21))


def test_rollouts_are_dumped(vllm_run: Run) -> None:
    files = sorted((vllm_run.folder.parent / "rollouts").glob("*.jsonl"))
    assert len(files) == 20
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 16
    assert {row["data_source"] for row in rows} == {"letters", "sums"}


@pytest.fixture(scope="module")
def resumed_runs(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """GRPO on a task reward with the small engine: two steps and a checkpoint, then two more from it."""
    folder = tmp_path_factory.mktemp("hf_run")
    train = write_onerec_parquet(folder / "train.parquet", 64)
    reward = folder / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return float(len(solution_str) % 7)\n"
    )
    overrides = [
        *SIZES,
        "algorithm.adv_estimator=grpo",
        f"custom_reward_function.path={reward}",
        f"data.val_files={train}",
        "data.val_max_samples=8",
        "trainer.test_freq=2",
        "trainer.val_before_train=False",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=2",
        "trainer.n_gpus_per_node=2",
        "trainer.save_freq=2",
        "trainer.max_actor_ckpt_to_keep=1",
        "trainer.logger=[console,file]",
    ]
    env = script_env(tiny_pair, train)
    first = launch(folder / "run", [*overrides, "trainer.total_training_steps=2"], env)
    assert first.returncode == 0, first.output[-6000:]
    second = launch(folder / "run", [*overrides, "trainer.total_training_steps=4"], env)
    assert second.returncode == 0, second.output[-6000:]
    return first, second


def test_a_run_continues_from_its_checkpoint(resumed_runs: tuple[Run, Run]) -> None:
    _, second = resumed_runs
    assert sorted(second.metrics) == [1, 2, 3, 4]
    assert (second.folder / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert [path.name for path in second.folder.glob("global_step_*")] == ["global_step_4"]


def test_a_task_reward_is_learned_from_and_validated(resumed_runs: tuple[Run, Run]) -> None:
    _, second = resumed_runs
    data = second.metrics[4]
    assert 0 <= data["critic/score/mean"] <= 6
    assert 0 <= data["val/letters/reward"] <= 6
    assert {key for key in data if key.startswith("distill/")} == {"distill/engine_gap", "distill/engine_gap_exceeded"}


def test_a_wrong_model_path_is_named_before_anything_starts(tiny_pair: Pair, tmp_path: Path) -> None:
    train = write_onerec_parquet(tmp_path / "train.parquet", 8)
    env = {**script_env(tiny_pair, train), "TEACHER_MODEL": str(tmp_path / "nowhere")}
    run = launch(tmp_path / "run", SIZES, env, timeout_s=120)
    assert run.returncode != 0
    assert "actor_rollout_ref.ref.model.path" in run.output
    assert str(tmp_path / "nowhere") in run.output
    assert "ray" not in run.output.lower().replace("verl.single_controller.ray", "")


@pytest.mark.slow
def test_real_tokenizers_and_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    """Two steps at V = 176,384 rows with the real Qwen3 and OneRec tokenizers."""
    tokenizers = shared_data / "tokenizer"
    pair = make_pair(tokenizers / "qwen3", tokenizers / "qwen3-onerec", tmp_path / "pair", "--hidden", "64")
    assert pair.extend_vocab_start_token == 151669
    train = shared_data / "onerec" / "train" / "sft_general.parquet"
    overrides = [
        "data.max_prompt_length=256",
        "data.max_response_length=64",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=2",
        "trainer.logger=[console,file]",
    ]
    run = launch(tmp_path / "run", overrides, script_env(pair, train), timeout_s=900)
    assert run.returncode == 0, run.output[-6000:]
    assert sorted(run.metrics) == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.n_gpus_per_node=64", "trainer.n_gpus_per_node=64: this machine has"),
        ("trainer.default_local_dir=/proc/nowhere", "trainer.default_local_dir=/proc/nowhere"),
        ("actor_rollout_ref.rollout.extend_vocab_start_token=null", "neither shared nor extended"),
    ],
)
def test_what_only_this_machine_or_these_models_tell_is_said_before_ray_starts(
    tiny_pair: Pair, tmp_path: Path, override: str, message: str
) -> None:
    train = write_onerec_parquet(tmp_path / "train.parquet", 64)
    batch = ["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=64"]
    run = launch(tmp_path / "run", [*SIZES, *batch], script_env(tiny_pair, train), timeout_s=120, last=override)
    assert run.returncode != 0
    assert message in run.output
    assert "Traceback" not in run.output
    assert "local Ray instance" not in run.output

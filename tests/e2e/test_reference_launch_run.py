"""A launch line of verl's distillation recipe starts and makes a step; only paths and sizes are replaced."""

import subprocess
import sys
from pathlib import Path

from support.launch import read_metrics, reference_launch, write_onerec_parquet
from support.tiny_pairs import Pair


def test_every_reference_key_on_one_command_line(tiny_pair: Pair, tmp_path: Path) -> None:
    paths = {
        "STUDENT": tiny_pair.student,
        "TEACHER": tiny_pair.teacher,
        "TRAIN": write_onerec_parquet(tmp_path / "train.parquet", 16),
        "VAL": write_onerec_parquet(tmp_path / "val.parquet", 8),
        "OUT": tmp_path / "out",
    }
    replaced = {
        "data.max_prompt_length": "64",
        "data.max_response_length": "32",
        "data.train_batch_size": "8",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "8",
        "actor_rollout_ref.rollout.extend_vocab_start_token": str(tiny_pair.extend_vocab_start_token),
        "actor_rollout_ref.rollout.agent.num_workers": "1",
        "trainer.logger": "[console,file]",
        "trainer.n_gpus_per_node": "1",
        "trainer.save_freq": "1",
        "trainer.default_local_dir": str(tmp_path / "run"),
    }
    arguments = [*reference_launch(replaced), "trainer.total_training_steps=1"]
    for name, path in paths.items():
        arguments = [argument.replace(f"={name}", f"={path}") for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "recipe.onpolicy_distill.main_onpolicy_distill", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    metrics = read_metrics(tmp_path / "run")
    assert sorted(metrics) == [1]
    assert metrics[1]["distill/trained_tokens"] > 0
    assert (tmp_path / "run" / "global_step_1" / "actor").is_dir()
    for key in ("data.image_key", "data.video_key", "trainer.default_hdfs_dir"):
        assert done.stdout.count(f"{key} is accepted") == 1
    assert "biased" in done.stdout, "top_p=0.95 and top_k=200 are not corrected for"

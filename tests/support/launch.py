"""Start a distillation run as a user does, and read what it left behind."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.tiny_pairs import REPO, Pair

SCRIPT = "recipe/onpolicy_distill/run_qwen3_distill.sh"
WORDS = ["copy", "reverse", "upper", "sort", "add", "count", "name", "list", "draw", "find"]


def write_onerec_parquet(path: Path, rows: int, sources: tuple[str, ...] = ("letters", "sums")) -> Path:
    """Chat rows in OneRec's layout, whose prompts differ, spread over the sources in turn."""
    messages = [
        [
            {"role": "user", "content": [{"type": "text", "text": f"{WORDS[row % 10]} {row} and {row * 7 % 50}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": str(row)}]},
        ]
        for row in range(rows)
    ]
    columns = {
        "source": [sources[row % len(sources)] for row in range(rows)],
        "uuid": [f"row-{row}" for row in range(rows)],
        "messages": [json.dumps(chat, ensure_ascii=False) for chat in messages],
        "metadata": ["{}"] * rows,
    }
    pq.write_table(pa.table(columns), path)
    return path


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What a run logged to ``metrics.jsonl``, by step."""
    merged: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        merged.setdefault(line["step"], {}).update(line["data"])
    return merged


@dataclass
class Run:
    """A finished run."""

    folder: Path
    output: str
    returncode: int

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Logged metrics by step."""
        return read_metrics(self.folder)

    def series(self, key: str) -> list[float]:
        """Values of one metric in step order, over the steps that have it."""
        return [data[key] for _, data in sorted(self.metrics.items()) if key in data]


def script_env(pair: Pair, train: Path) -> dict[str, str]:
    """Variables of the launch script for a pair and its training prompts."""
    return {
        "BASE_MODEL": str(pair.student),
        "TEACHER_MODEL": str(pair.teacher),
        "DATASET_PARQUET": str(train),
        "EXTEND_VOCAB_START_TOKEN": str(pair.extend_vocab_start_token),
    }


def small_run(engine: str, ranks: int, steps: int, **changes: Any) -> list[str]:
    """Overrides of a run of seconds that saves every other step; ``changes`` wins."""
    values = {
        "actor_rollout_ref.actor.optim.lr": 3e-4,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.total_training_steps": steps,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 2048,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.name": engine,
        "data.max_prompt_length": 64,
        "data.max_response_length": 16,
        "data.train_batch_size": 8,
        "data.enable_think": True,
        "trainer.n_gpus_per_node": ranks,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": 2,
        "trainer.val_before_train": False,
        "trainer.logger": "[console,file]",
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def launch_command(folder: Path, overrides: list[str]) -> list[str]:
    """The launch script with the folder of the run; it becomes the driver."""
    return ["bash", str(REPO / SCRIPT), *overrides, f"trainer.default_local_dir={folder}"]


def launch_environment(env: dict[str, str]) -> dict[str, str]:
    """This process's environment, with which tests start a run, and ``env``."""
    return {**os.environ, "ENV_DIR": sys.prefix, "WANDB_MODE": "offline", **env}


def launch(folder: Path, overrides: list[str], env: dict[str, str], *, timeout_s: int = 600) -> Run:
    """Run the launch script in a session of its own; a run that takes too long is ended with all it started."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        launch_command(folder, overrides),
        cwd=folder,
        env=launch_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s; the last lines:\n{output[-4000:]}") from None
    return Run(folder, output, process.returncode)

"""The distillation: the normal entry point, in a process of its own, going on from its last checkpoint.

In: teacher, student, data, prompts. Out: the folder of the trained model. Three quarters of each batch are general
prompts, scored by the teacher; a quarter are questions of the recommender, scored by the student as it was, frozen.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.real_model.prompts import MAX_TOKENS

logger = logging.getLogger(__name__)

REHEARSAL_SHARE = 0.25
MAIN = "recipe.onpolicy_distill.main_onpolicy_distill"


@dataclass(frozen=True)
class DistilConfig:
    """How long, and how fast."""

    seed: int = 0
    steps: int = 150
    prompts: int = 16
    """In a batch."""
    answer_tokens: int = 64
    learning_rate: float = 2e-4
    bf16: bool = False
    """Train in bf16 on the CPU."""


def distil(
    teacher: Path,
    student: Path,
    files: Sequence[Path],
    folder: Path,
    config: DistilConfig,
    overrides: Sequence[str] = (),
) -> Path:
    """Train below ``folder``, go on there, or find that it is done.

    Args:
        files: folders of data and of prompts.
        overrides: of Hydra, the user's.

    Raises:
        RuntimeError: the run failed.
    """
    values = settings(teacher, student, files, config)
    text = json.dumps([[path.name for path in (teacher, student, *files)], asdict(config), *overrides], indent=1)
    run = folder / f"run-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    trained = run / f"global_step_{config.steps}" / "actor" / "huggingface"
    if (trained / "config.json").is_file():
        logger.info("reused: %s", trained)
        return trained
    run.mkdir(parents=True, exist_ok=True)
    (run / "key.json").write_text(text + "\n", encoding="utf-8")
    values |= {"trainer.default_local_dir": run, "data.cache_dir": folder / "data-cache"}
    command = [sys.executable, "-m", MAIN, *(f"{key}={value}" for key, value in values.items()), *overrides]
    if code := subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"the distillation ended with code {code}; its own first error is above")
    return trained


def settings(teacher: Path, student: Path, files: Sequence[Path], config: DistilConfig) -> dict[str, Any]:
    """The Hydra overrides, but for folders of the run."""
    data, prompts = files
    values: dict[str, Any] = {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": teacher,
        "actor_rollout_ref.actor.optim.lr": config.learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
        "actor_rollout_ref.rollout.extend_vocab_start_token": "auto",
        "actor_rollout_ref.rollout.seed": config.seed,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "algorithm.distill.objective": "exact",
        "algorithm.distill.support": "shared",
        "algorithm.distill.leak_coef": 1.0,
        "++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*]}",
        "data.train_files": f"[{prompts / 'general_train.parquet'},{data / 'rec_train.parquet'}]",
        "data.source_weights": f"{{rec_*:{REHEARSAL_SHARE},general_*:{1 - REHEARSAL_SHARE}}}",
        "data.max_prompt_length": MAX_TOKENS,
        "data.max_response_length": config.answer_tokens,
        "data.train_batch_size": config.prompts,
        "data.seed": config.seed,
        "trainer.n_gpus_per_node": max(1, torch.cuda.device_count()),
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": 1000,
        "trainer.save_freq": max(1, config.steps // 4),
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.resume_mode": "auto",
        "trainer.logger": "[console,file]",
    }
    if config.bf16:
        values["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"] = "bf16"
    return values

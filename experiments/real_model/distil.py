"""The distillation: the normal entry point, in a process of its own, going on from its last checkpoint.

In: teacher, student, data, prompts. Out: the folder of the trained model. Settings are in ``distillation.yaml``.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipe.onpolicy_distill.quickstart.cache import key_digest
from recipe.onpolicy_distill.quickstart.child import run_child

logger = logging.getLogger(__name__)

MAIN = "recipe.onpolicy_distill.main_onpolicy_distill"
SETTINGS = Path(__file__).with_name("distillation.yaml")
EXACT, SAMPLED, PUBLIC_FORK = MODES = ("exact", "sampled", "public-fork")
"""``sampled``: the original method, drawn tokens and general prompts alone. ``public-fork``: as it, but what follows an
item token is trained on, and the teacher reads an end token for it."""
OF_EXACT = ("algorithm.distill.", "++algorithm.distill.", "data.source_weights")
"""How keys begin that the other modes leave as the recipe has them."""


@dataclass(frozen=True)
class DistilConfig:
    """How long, and how fast."""

    seed: int = 0
    bf16: bool = False
    """Train in bf16."""
    mode: str = EXACT
    """One of MODES."""
    steps: int = 150
    prompts: int = 16
    """In a batch."""
    answer_tokens: int = 64
    first_tokens: int | None = None
    """Where answers are cut at first; the cut moves to ``answer_tokens`` over two thirds of the steps. None: there."""
    learning_rate: float = 2e-4


def distil(folder: Path, config: DistilConfig, overrides: Sequence[str], **files: Path) -> Path:
    """Train below ``folder``, go on there, or find that it is done; raises RuntimeError where the run fails.

    Args:
        overrides: of Hydra, the user's.
        files: as for ``settings``.
    """
    values = settings(config, **files)
    run = folder / f"run-{key_digest([{key: str(value) for key, value in values.items()}, *overrides])}"
    if (run / "done").is_file():
        logger.info("reused: %s", run)
    else:
        values |= {"trainer.default_local_dir": run, "data.cache_dir": folder / "data-cache"}
        command = [sys.executable, "-m", MAIN, *(f"{key}={value}" for key, value in values.items()), *overrides]
        if code := run_child(command):
            raise RuntimeError(f"the distillation ended with code {code}; its own first error is above")
        (run / "done").touch()
    return max(run.glob("global_step_*/actor/huggingface"), key=lambda path: int(path.parents[1].name.split("_")[-1]))


def settings(config: DistilConfig, *, teacher: Path, student: Path, data: Path, prompts: Path) -> dict[str, Any]:
    """The Hydra overrides, but for folders of the run; ``data`` and ``prompts`` are the folders of their files."""
    import torch

    from verl.utils.tokenizer import hf_tokenizer

    values: dict[str, Any] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    # Quoted, for a folder's name may hold what Hydra's grammar has a use for.
    train_files = json.dumps([f"{prompts / 'general_train.parquet'}", f"{data / 'rec_train.parquet'}"])
    if config.mode != EXACT:
        values = {key: value for key, value in values.items() if not key.startswith(OF_EXACT)}
        train_files = f"{prompts / 'general_train.parquet'}"
    if config.mode == PUBLIC_FORK:
        values["actor_rollout_ref.rollout.mask_after_extend_token"] = False
        values["actor_rollout_ref.ref.ref_replace_token_id"] = hf_tokenizer(teacher).eos_token_id
    if config.first_tokens is not None:
        growth = f"start:{config.first_tokens},end:{config.answer_tokens},steps:{config.steps * 2 // 3}"
        values["actor_rollout_ref.rollout.horizon"] = f"{{{growth}}}"
    if config.bf16:
        values["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"] = "bf16"
    return values | {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": teacher,
        "actor_rollout_ref.actor.optim.lr": config.learning_rate,
        "actor_rollout_ref.rollout.seed": config.seed,
        "data.train_files": train_files,
        "data.max_response_length": config.answer_tokens,
        "data.train_batch_size": config.prompts,
        "data.seed": config.seed,
        "trainer.n_gpus_per_node": max(1, torch.cuda.device_count()),
        "trainer.total_training_steps": config.steps,
        "trainer.save_freq": max(1, config.steps // 4),
    }

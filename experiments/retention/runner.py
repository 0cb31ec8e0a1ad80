"""One run: the real trainer, workers and data sets in this process, then the scoreboard.

In: a `Run`. Out: its record. Without Ray (``init_workers(in_process=True)``); the engine is the small one of
transformers, and ``evaluate`` measures with it too.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

from experiments.retention.ledger import LEDGER, keep_ledger
from experiments.retention.results import DONE, Extras, Record, Run, record_of
from experiments.retention.tweaks import TWEAKS, student_of
from experiments.retention.variants import BEFORE, END_TOKEN, NONE, REHEARSAL_SHARE, TEACHER, VARIANTS, share_of
from experiments.retention.worlds import Prepared, prepare
from recipe.onpolicy_distill.combine_models import combine_models
from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from recipe.onpolicy_distill.quickstart.cache import cached_folder
from recipe.onpolicy_distill.quickstart.distillation import EXACT_MATCH
from recipe.onpolicy_distill.quickstart.scoreboard import score
from recipe.onpolicy_distill.scoreboard import measures
from verl.config.best_rule import metric_value
from verl.protocol import DataProto
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.tokenizer import hf_tokenizer

TEST_EVERY = 10
"""Steps between the points of the curve."""
ENDLESS = 1_000_000
"""Steps of a run that ends after some seconds."""
ENGINE_ROWS = 1024
"""Sequences that the scoreboard's engine takes at once; half the time of the default's."""
NO_EXTRAS = Extras()


def execute(run: Run, out: Path, extras: Extras = NO_EXTRAS) -> Record:
    """Train and measure, or measure alone.

    Args:
        out: folder of the study; worlds and models are kept below it.
        extras: what is measured besides.

    Raises:
        ValueError: a setting that cannot be used.
        RuntimeError: an engine or a worker failed.
    """
    prepared = prepare(run.world, run.student_seed, out / "cache")
    if run.variant == TEACHER:
        return record_of(run, DONE, metrics=scoreboard(prepared, prepared.teacher, rec=False))
    if run.variant == BEFORE:
        return record_of(run, DONE, metrics=scoreboard(prepared, prepared.student, extras=extras))
    folder = out / "runs" / run.name
    shutil.rmtree(folder, ignore_errors=True)
    train(run, prepared, folder, out / "cache" / "data", extras)
    steps, seconds, curve = read_curve(folder / "metrics.jsonl")
    checkpoint = folder / f"global_step_{steps}"
    metrics = scoreboard(prepared, checkpoint / "actor" / "huggingface", extras=extras)
    shutil.rmtree(checkpoint)
    return record_of(run, DONE, metrics=metrics, curve=curve, steps=steps, seconds=seconds)


def train(run: Run, prepared: Prepared, folder: Path, data_cache: Path, extras: Extras = NO_EXTRAS) -> None:
    """Distil into ``folder``: ``metrics.jsonl`` and the last checkpoint, and ``ledger.jsonl`` where it is asked for."""
    settings = trainer_settings(run, prepared, folder, data_cache)
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    check_run(config)
    trainer = build_trainer(config)
    if run.seconds is not None:
        end_after(trainer, run.seconds)
    try:
        trainer.init_workers(in_process=True)
        if tweak := VARIANTS[run.variant].tweak:
            TWEAKS[tweak](trainer)
        if extras.ledger_every:  # after the tweak, so that it takes apart what is trained
            keep_ledger(student_of(trainer), lambda: trainer.global_steps, run, folder / LEDGER, extras.ledger_every)
        trainer.fit()
    finally:
        trainer.shutdown()


def trainer_settings(run: Run, prepared: Prepared, folder: Path, data_cache: Path) -> dict[str, Any]:
    """Every Hydra override of a run."""
    world, steps = prepared.world, run.steps or ENDLESS
    settings: dict[str, Any] = {
        "actor_rollout_ref.model.path": prepared.student,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.ref.model.path": prepared.teacher,
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.rollout.extend_vocab_start_token": world.extend_vocab_start_token,
        "actor_rollout_ref.rollout.seed": run.seed,
        "actor_rollout_ref.rollout.val_kwargs.do_sample": False,
        "actor_rollout_ref.actor.checkpoint.save_contents": "[hf_model]",
        "data.val_files": world.general_test,
        "data.max_prompt_length": prepared.max_prompt_tokens,
        "data.max_response_length": prepared.max_answer_tokens,
        "data.cache_dir": data_cache,
        "data.seed": run.seed,
        "custom_reward_function.path": EXACT_MATCH,
        "trainer.device": "cpu",
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": ENDLESS,
        "trainer.test_freq": TEST_EVERY,
        "trainer.save_freq": steps,
        "trainer.async_save": False,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[file]",
        "trainer.default_local_dir": folder,
    }
    variant = VARIANTS[run.variant].all_settings
    rehearsal, _ = variant.pop("rehearsal"), variant.pop("tweak", None)
    if share := float(variant.pop("teacher_share", 0.0)):
        settings["actor_rollout_ref.model.path"] = averaged(prepared, share, data_cache.parent)
        variant["++algorithm.distill.teachers.self.path"] = str(prepared.student)
    if rehearsal == NONE:
        settings["data.train_files"] = world.general_train
    else:
        settings["data.train_files"] = json.dumps([str(world.general_train), str(prepared.rehearsal[str(rehearsal)])])
        settings |= share_of(REHEARSAL_SHARE)
    if "trainer.keep" in variant:  # what is kept has to be validated
        settings["data.val_files"] = json.dumps([str(world.general_test), str(world.rec_test)])
    end_token = hf_tokenizer(world.teacher_tokenizer).eos_token_id
    return settings | {key: end_token if value == END_TOKEN else value for key, value in variant.items()}


def averaged(prepared: Prepared, teacher_share: float, folder: Path) -> Path:
    """The student averaged with the teacher, made or found below ``folder``."""
    parts = {prepared.student: 1 - teacher_share, prepared.teacher: teacher_share}
    key = {path.name: share for path, share in parts.items()}
    start = prepared.world.extend_vocab_start_token
    return cached_folder(folder, "average", key, lambda made: combine_models(parts, made / "model", start)) / "model"


def end_after(trainer: RayPPOTrainer, seconds: float) -> None:
    """Let a trainer end with the step in which its steps, validation not counted, have taken this long."""
    train_step, spent = trainer.train_step, 0.0

    def timed_step(batch: DataProto) -> dict[str, float]:
        nonlocal spent
        metrics = train_step(batch)
        spent += metrics["timing_s/step"]
        if spent >= seconds:
            trainer.total_steps = trainer.global_steps
        return metrics

    trainer.train_step = timed_step  # type: ignore[method-assign]


def read_curve(path: Path) -> tuple[int, float, list[tuple[int, float]]]:
    """Steps, seconds of training, and general accuracy by step, from a run's ``metrics.jsonl``."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seconds = sum(line["data"].get("timing_s/step", 0.0) for line in lines)
    validated = [line for line in lines if "val/reward" in line["data"]]
    # Other prompts are validated too where a share is steered.
    is_steered = any(name.startswith("keep/") for line in validated for name in line["data"])
    name = "val/general_*/reward" if is_steered else "val/reward"
    curve = [(line["step"], metric_value(line["data"], name)) for line in validated]
    return lines[-1]["step"], seconds, curve


def scoreboard(prepared: Prepared, model: Path, *, rec: bool = True, extras: Extras = NO_EXTRAS) -> dict[str, Any]:
    """The metrics of ``evaluate`` for one model; without recommendation where it has no item tokens."""
    settings: dict[str, Any] = {
        "engine": "hf",
        "device": "cpu",
        "max_prompt_length": prepared.max_prompt_tokens,
        "max_new_tokens": prepared.max_answer_tokens,
        "rollout": {"max_num_seqs": ENGINE_ROWS},
    }
    with patch.object(measures, "KS", (*measures.KS, *extras.recall_at)):
        return score(prepared.world, model, prepared.teacher, rec=rec, **settings).metrics

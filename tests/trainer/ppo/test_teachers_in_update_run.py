"""What the update's own pass scores gives the metrics and weights of a run that scores in stages before it."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import MEASURED, run_in_process, settings
from support.launch import read_metrics, write_onerec_parquet
from support.tiny_pairs import make_pair

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 3
OF_NO_ADVANTAGE = ("critic/advantages/", "critic/returns/")
DISTILL, ACTOR = "algorithm.distill", "actor_rollout_ref.actor"
TEACHERS = {
    f"++{DISTILL}.teachers.self": "{vocabulary:full,sources:[rec_*],weight:0.5}",
    f"++{DISTILL}.teachers.both": "{vocabulary:stitched,sources:[mixed]}",
}
EXACT = {f"{DISTILL}.objective": "exact", f"{DISTILL}.support": "shared", **TEACHERS}
REWARD = {"algorithm.adv_estimator": "grpo", "actor_rollout_ref.rollout.n": 2}
BESIDE = {**REWARD, f"{DISTILL}.coef": 0.7}
# Tokens lie beyond both bounds. Micro-batches are others than those of a stage.
SAMPLED = {"algorithm.distill_adv_min_clip": -0.5, "algorithm.distill_adv_max_clip": 0.05}
SAMPLED |= {f"{ACTOR}.ppo_max_token_len_per_gpu": 96}
TERMS = {f"{ACTOR}.entropy_coeff": 0.1, f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}
SEVERAL = {f"{ACTOR}.ppo_mini_batch_size": 3, f"{ACTOR}.ppo_epochs": 2}
NOT_FINITE = {f"actor_rollout_ref.{name}.ref_log_prob_replace_val": "-inf" for name in ("actor", "ref")}
NOT_FINITE |= {"trainer.max_skipped_updates": "null"}


def train(values: dict[str, Any], scores_before: bool, pair: Any, prompts: Path, folder: Path) -> Any:
    """Train, scoring in stages before the update or in it; returns metrics, weights, who scored training rows."""
    reward = folder.parent / "reward.py"
    reward.write_text("def compute_score(solution_str, **_):\n    return len(set(solution_str)) / 8\n")
    values = {
        f"{ACTOR}.optim.lr": 1e-4,
        f"{ACTOR}.ppo_mini_batch_size": 6,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "custom_reward_function.path": reward,
        "data.train_batch_size": 6,
        "data.val_files": prompts,
        "trainer.test_freq": STEPS,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
        "trainer.canary_tolerance": "null",
        **values,
    }
    called: list[str] = []

    def score(role: str, run: Any, batch: Any) -> Any:
        called.extend([] if batch.meta_info["validate"] else [role])
        return run(batch)

    def record(trainer: Any) -> None:
        if scores_before:
            forced = {"student_scores_in_update": False}
            forced |= {} if trainer.uses_advantage else {"uses_reference": True, "uses_advantage": True}
            trainer.__class__ = type("ScoresBefore", (type(trainer),), forced)
        for role, group in trainer.role_groups.items():
            name = "compute_log_prob" if role == "actor" else "compute_ref_log_prob"
            setattr(group, name, partial(score, role, getattr(group, name)))

    run_in_process(settings(pair, prompts, folder, **values), tamper=record)
    metrics = {
        step: {n: math.nan if v is None else v for n, v in logged.items() if not n.startswith(MEASURED)}
        for step, logged in read_metrics(folder).items()
    }
    return metrics, load_file(folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors"), called


@pytest.mark.parametrize(
    ("values", "scoring"),
    [
        (EXACT, []),
        (EXACT | SEVERAL, ["actor"]),
        (EXACT | BESIDE, []),
        (SAMPLED, ["ref"]),
        (SAMPLED | TERMS, ["ref"]),
        (SAMPLED | SEVERAL, ["actor", "ref"]),
        (SAMPLED | TERMS | TEACHERS | BESIDE, ["ref", "self", "both"]),
        (NOT_FINITE, ["ref"]),
        (REWARD, []),
        (REWARD | TERMS, ["ref"]),
    ],
)
def test_metrics_and_weights_are_those_of_a_run_that_scores_before(
    values: dict[str, Any], scoring: list[str], tiny_tokenizers: Any, tmp_path: Path
) -> None:
    pair = make_pair(*tiny_tokenizers, tmp_path / "pair", extended_scale=1.0)  # draws item tokens
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 12, sources=("general", "rec_next", "mixed"))
    updated, weights, called = train(values, False, pair, prompts, tmp_path / "updated")
    before, right, called_before = train(values, True, pair, prompts, tmp_path / "before")
    assert (called, called_before[0]) == (scoring * STEPS, "actor")
    follows_advantage = f"{DISTILL}.objective" not in values or f"{DISTILL}.coef" in values
    for name, value in weights.items():  # without a ratio that rounds there is no difference at all
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-6 if follows_advantage else 0)
    for step, found in before.items():
        dropped = () if follows_advantage else OF_NO_ADVANTAGE
        expected = {name: value for name, value in found.items() if not name.startswith(dropped)}
        assert updated[step] == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)
    last = updated[STEPS]
    assert last["actor/skipped_updates"] == (values is NOT_FINITE) and last["training/rollout_probs_diff_mean"] > 0
    assert last["actor/entropy"] > 1 and abs(last.get("distill/general/reverse_kl", 1)) > 1e-3
    assert min(last.get(f"distill/{name}", 1) for name in ("extend_mass", "extend_seq_ratio")) > 0
    if SAMPLED.items() <= values.items():
        assert last["distill/adv_clipfrac_low"] > 0 < last["distill/adv_clipfrac_high"]

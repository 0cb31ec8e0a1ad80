"""What the update's own pass scores gives the metrics and weights of a run that scores in stages before it."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import run_in_process, settings
from support.launch import MEASURED, metrics_by_step, write_onerec_parquet
from support.tiny_pairs import make_pair

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 3
DISTILL, ACTOR = "algorithm.distill", "actor_rollout_ref.actor"
TEACHERS = {
    f"++{DISTILL}.teachers.self": "{vocabulary:full,sources:[rec_*],weight:0.5}",
    f"++{DISTILL}.teachers.both": "{vocabulary:stitched,sources:[mixed]}",
}
EXACT = {f"{DISTILL}.objective": "exact", f"{DISTILL}.support": "shared", **TEACHERS}
REWARD = {"algorithm.adv_estimator": "grpo", "actor_rollout_ref.rollout.n": 2}
BESIDE = {**REWARD, f"{DISTILL}.coef": 0.7}
# Tokens lie beyond both bounds.
SAMPLED = {"algorithm.distill_adv_min_clip": -0.5, "algorithm.distill_adv_max_clip": 0.05}
TERMS = {f"{ACTOR}.entropy_coeff": 0.1, f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}
SEVERAL = {f"{ACTOR}.ppo_mini_batch_size": 3, f"{ACTOR}.ppo_epochs": 2}
NOT_FINITE = {f"actor_rollout_ref.{name}.ref_log_prob_replace_val": "-inf" for name in ("actor", "ref")}
NOT_FINITE |= {"algorithm.distill_adv_max_clip": 0.05}


def train(values: dict[str, Any], scores_before: bool, pair: Any, prompts: Path, folder: Path) -> Any:
    """Train, scoring in stages before the update or in it; returns metrics, weights, who scored training rows."""
    reward = folder.parent / "reward.py"
    reward.write_text("def compute_score(solution_str, **_):\n    return len(set(solution_str)) / 8\n")
    # Micro-batches are others than those of a stage.
    common = dict.fromkeys(("trainer.test_freq", "trainer.total_training_steps", "trainer.save_freq"), STEPS)
    common |= dict.fromkeys((f"{ACTOR}.ppo_mini_batch_size", "data.train_batch_size"), 6)
    common |= {f"{ACTOR}.ppo_max_token_len_per_gpu": 96, "actor_rollout_ref.rollout.calculate_log_probs": True}
    common |= dict.fromkeys(("trainer.max_skipped_updates", "trainer.canary_tolerance"), "null")
    common |= {"custom_reward_function.path": reward, "data.val_files": prompts, f"{ACTOR}.optim.lr": 1e-4}
    called: list[str] = []

    def score(role: str, run: Any, batch: Any) -> Any:
        called.extend([] if batch.meta_info["validate"] else [role])
        return run(batch)

    def record(trainer: Any) -> None:
        if scores_before:
            forced = {"student_scores_in_update": False, "uses_reference": "ref" in trainer.role_groups}
            trainer.__class__ = type("ScoresBefore", (type(trainer),), forced)
        for role, group in trainer.role_groups.items():
            name = "compute_log_prob" if role == "actor" else "compute_ref_log_prob"
            setattr(group, name, partial(score, role, getattr(group, name)))

    run_in_process(settings(pair, prompts, folder, **common | values), tamper=record)
    metrics = {
        step: {n: math.nan if v is None else v for n, v in logged.items()}
        for step, logged in metrics_by_step(folder, STEPS, MEASURED).items()
    }
    return metrics, load_file(folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors"), called


@pytest.mark.parametrize(
    ("values", "scoring", "tolerance"),
    [
        (EXACT, [], 0),
        (EXACT | SEVERAL, ["actor"], 0),
        (EXACT | BESIDE, [], 1e-6),
        (SAMPLED, ["ref"], 1e-6),
        (SAMPLED | SEVERAL, ["actor", "ref"], 0),
        (SAMPLED | TERMS | TEACHERS | BESIDE, ["ref", "self", "both"], 1e-6),
        (NOT_FINITE, ["ref"], 0),
        (REWARD, [], 1e-6),
    ],
)
def test_metrics_and_weights_are_those_of_a_run_that_scores_before(
    values: dict[str, Any], scoring: list[str], tolerance: float, tiny_tokenizers: Any, tmp_path: Path
) -> None:
    pair = make_pair(*tiny_tokenizers, tmp_path / "pair", extended_scale=1.0)  # draws item tokens
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 12, sources=("general", "rec_next", "mixed"))
    updated, weights, called = train(values, False, pair, prompts, tmp_path / "updated")
    before, right, called_before = train(values, True, pair, prompts, tmp_path / "before")
    assert (called, called_before[0]) == (scoring * STEPS, "actor")
    torch.testing.assert_close(weights, right, rtol=0, atol=tolerance)
    for step, expected in before.items():
        # The largest engine gap is a difference of log-probs near 8, whose last bit is 1e-6.
        assert updated[step] == pytest.approx(expected, rel=1e-6, abs=3e-6, nan_ok=True)
    last = updated[STEPS]
    assert last["actor/skipped_updates"] == (values is NOT_FINITE) and last["training/rollout_probs_diff_mean"] > 0
    assert last["actor/entropy"] > 1 and abs(last.get("distill/general/reverse_kl", 1)) > 1e-3
    assert min(last.get(f"distill/{n}", 1) for n in ("extend_mass", "extend_seq_ratio", "adv_clipfrac_high")) > 0

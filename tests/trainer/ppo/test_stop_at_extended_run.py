"""An answer that ends at its first item token trains what a masked one trains, and writes no more than that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import run_in_process, settings
from support.launch import metrics_by_step, write_onerec_parquet
from support.tiny_pairs import make_pair

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 2


@pytest.mark.parametrize("objective", ["sampled", "exact"])
def test_losses_and_weights_are_those_of_masked_answers(
    objective: str, tiny_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    pair = make_pair(*tiny_tokenizers, tmp_path / "pair", extended_scale=1.0)
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 24, sources=("general", "rec_next"))
    lines, weights = [], []
    for stops in (True, False):
        folder = tmp_path / str(stops)
        values = {
            "actor_rollout_ref.rollout.stop_at_extended_token": stops,
            "algorithm.distill.objective": objective,
            "++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*]}",
            "data.max_response_length": 24,
            "data.train_batch_size": 12,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 12,
            "trainer.balance_batch": False,  # by lengths, which differ
            "trainer.total_training_steps": STEPS,
            "trainer.save_freq": STEPS,
        }
        run_in_process(settings(pair, prompts, folder, **values))
        lines.append(metrics_by_step(folder, STEPS).values())
        weights.append(load_file(folder / f"global_step_{STEPS}/actor/huggingface/model.safetensors"))
    # Scoring before the update is over whole answers, whose products round otherwise.
    tolerance = 0 if objective == "exact" else 1e-5
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=tolerance)
    for cut, whole in zip(*lines, strict=True):
        for name in ("actor/loss", "actor/grad_norm", "distill/trained_tokens", "distill/extend_seq_ratio"):
            assert cut[name] == pytest.approx(whole[name], rel=tolerance), name
        assert cut["distill/general/trained_token_ratio"] == 1.0 > whole["distill/general/trained_token_ratio"]
        # Those of the frozen self go on after an item, which it knows.
        assert cut["distill/rec_next/trained_token_ratio"] == whole["distill/rec_next/trained_token_ratio"] == 1.0
        assert cut["agent_loop/unwritten_tokens"] > 0 == whole["agent_loop/unwritten_tokens"]

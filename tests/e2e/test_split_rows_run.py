"""A run whose ranks share rows is the run of one rank: the same answers, and metrics but for rounding."""

from pathlib import Path

import pytest
from support.launch import launch, metrics_by_step, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 2


def test_two_ranks_that_share_rows_make_the_run_of_one(tiny_pair: Pair, tmp_path: Path) -> None:
    env = script_env(tiny_pair, write_onerec_parquet(tmp_path / "train.parquet", 16))
    objective = {"algorithm.distill.objective": "exact", "trainer.save_freq": -1}
    # A row of 64 + 16 tokens is longer than a rank's part of a micro-batch.
    split = {
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 48,
    }
    alone = launch(tmp_path / "alone", small_run("hf", 1, STEPS, **objective), env)
    shared = launch(tmp_path / "shared", small_run("hf", 2, STEPS, **objective, **split), env)
    expected, found = (metrics_by_step(run.folder, STEPS) for run in (alone, shared))
    for step, metrics in expected.items():
        assert found[step] == pytest.approx(metrics, rel=1e-3, abs=1e-4)

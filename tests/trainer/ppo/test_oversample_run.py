"""A small run that asks more prompts than it trains on, killed and resumed, with the transformers engine."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.in_process_run import run_in_process, settings
from support.launch import metrics_by_step, write_onerec_parquet

from verl.protocol import DataProto

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.usefixtures("one_rank")
def test_answers_that_are_cut_go_on_over_a_resume_and_validation_is_whole(tiny_pair: Any, tmp_path: Path) -> None:
    train = write_onerec_parquet(tmp_path / "train.parquet", 30)
    changes = {f"{ROLLOUT}.oversample": 1.5, f"{ROLLOUT}.n": 2, f"{ROLLOUT}.calculate_log_probs": True}
    changes |= {"data.val_files": train, "trainer.test_freq": 2, "trainer.async_save": False}
    changes["data.max_response_length"] = 24
    # The weights stay, so the trainer's log-probs are those with which each token was drawn, whenever that was.
    config = settings(tiny_pair, train, tmp_path, **changes, **{"actor_rollout_ref.actor.optim.lr": 1e-30})
    trained, validated, carried = list[str](), 0, 0

    def watch(trainer: Any) -> None:
        answers_to = trainer.rollouts.answers_to

        def record(prompts: DataProto) -> DataProto:
            nonlocal validated, carried
            rows, answers = len(prompts), answers_to(prompts)
            if prompts.meta_info["validate"]:
                validated += rows == len(answers) == 30
            else:
                assert (rows, len(answers)) == (12, 8)
                trained.extend(prompts.array("uid").tolist())
                waiting = trainer.rollouts._pool._waiting
                carried += sum(bool(written.token_ids) for prompt in waiting for written in prompt.written)
            return answers

        trainer.rollouts.answers_to = record

    run_in_process(config, dies_in_batch=4, tamper=watch)
    assert len(trained) == 16
    run_in_process(config, tamper=watch)
    assert set(Counter(trained).values()) == {2} and len(trained) == 5 * 8, "no prompt is trained on twice"
    assert carried > 0 and validated >= 3
    steps = metrics_by_step(tmp_path, 5)
    for step in steps.values():
        assert step["rollout/carried"] == 4 and step["rollout/dropped"] == 0
        assert step["training/rollout_probs_diff_max"] < 1e-5
    assert steps[5]["staleness/max"] >= 1

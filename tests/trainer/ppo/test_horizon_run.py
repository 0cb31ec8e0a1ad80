"""Training answers that are cut early (``rollout.horizon``): how long they may be, what counts them, what is left."""

from pathlib import Path
from typing import Any

import pytest
from support.in_process_run import run_in_process, settings
from support.launch import metrics_by_step, write_onerec_parquet

from verl.trainer.launch.typed import load_config

KEY = "actor_rollout_ref.rollout.horizon"


def overrides_of(**parts: int) -> dict[str, int]:
    return {f"{KEY}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize(
    ("overrides", "by_step"),
    [
        ({}, {1: None, 999: None}),
        ({KEY: 256}, {1: 256, 999: 256}),
        (overrides_of(start=64, end=512, steps=200), {1: 64, 2: 66, 101: 288, 200: 509, 201: 512}),
        ({KEY: "{start:9,end:2,steps:3}"}, {1: 9, 2: 6, 3: 4, 4: 2, 5: 2}),
    ],
)
def test_the_horizon_follows_from_the_step(overrides: dict[str, Any], by_step: dict[int, int | None]) -> None:
    horizon = load_config([f"{key}={value}" for key, value in overrides.items()]).actor_rollout_ref.rollout.horizon
    assert {step: horizon.at(step) for step in by_step} == by_step


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"start": 0}, r"start=0 must be greater than or equal to 1, or null"),
        ({"start": 513}, r"start=513 is above data\.max_response_length=512, .*; lower"),
        ({"start": 64, "end": 600, "steps": 9}, r"end=600 is above"),
        ({"start": 64, "end": 128}, "start=64, end=128 and steps=None; set all three, or start alone"),
        ({"end": 64, "steps": 9}, "start=None, end=64 and steps=9; set all three"),
    ],
)
def test_a_horizon_that_cannot_be_is_refused(parts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{KEY}.*{message}"):
        load_config([f"{key}={value}" for key, value in overrides_of(**parts).items()])


@pytest.mark.usefixtures("one_rank")
def test_training_answers_are_cut_and_counted_as_cut_and_validation_is_whole(tiny_pair: Any, tmp_path: Path) -> None:
    train = write_onerec_parquet(tmp_path / "train.parquet", 8)
    changes = overrides_of(start=2, end=5, steps=3) | {"data.val_files": train, "trainer.test_freq": 4}
    changes["actor_rollout_ref.rollout.ignore_eos"] = True  # every answer is as long as it may be
    config = settings(tiny_pair, train, tmp_path, **changes)
    run_in_process(config, dies_in_batch=3)
    run_in_process(config)
    steps = metrics_by_step(tmp_path, 5)
    for name in ("rollout/horizon", "response_length/min", "response_length/max"):
        assert [steps[step][name] for step in steps] == [2, 3, 4, 5, 5], name
    assert {steps[step]["response_length/clip_ratio"] for step in steps} == {1.0}
    assert steps[4]["val/response_length"] == 8

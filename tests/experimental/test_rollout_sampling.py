"""Sampling parameters and seeds."""

import numpy as np
import pytest

from verl.config import RolloutConfig, SamplingConfig
from verl.experimental.agent_loop.sampling import sample_seeds, sampling_params
from verl.protocol import DataProto


def prompts(uids: list[str], step: int = 1, validate: bool = False) -> DataProto:
    return DataProto.from_dict(
        non_tensors={"uid": np.array(uids, dtype=object)}, meta_info={"global_steps": step, "validate": validate}
    )


def test_training_and_validation_sample_by_their_own_settings() -> None:
    validation = SamplingConfig(temperature=0.6, top_p=0.9, top_k=20)
    config = RolloutConfig(temperature=1.1, top_p=0.95, top_k=200, calculate_log_probs=True, val_kwargs=validation)
    shared = {"ignore_eos": False, "logprobs": True}
    assert sampling_params(config, validate=False) == {"temperature": 1.1, "top_p": 0.95, "top_k": 200} | shared
    assert sampling_params(config, validate=True) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20} | shared


def test_greedy_validation_ignores_the_other_settings() -> None:
    config = RolloutConfig(val_kwargs=SamplingConfig(temperature=0.6, top_p=0.9, top_k=20, do_sample=False))
    found = sampling_params(config, validate=True)
    assert (found["temperature"], found["top_p"], found["top_k"]) == (0.0, 1.0, -1)


def test_seeds_tell_answers_prompts_steps_and_runs_apart() -> None:
    rows = ["a", "a", "b", "a"]
    seeds = [
        *sample_seeds(0, prompts(rows)),
        *sample_seeds(0, prompts(rows, step=2)),
        *sample_seeds(0, prompts(rows, validate=True)),
        *sample_seeds(1, prompts(rows)),
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_seeds_do_not_depend_on_the_order_of_prompts() -> None:
    first = dict(zip("abc", sample_seeds(0, prompts(["a", "b", "c"])), strict=True))
    second = dict(zip("cab", sample_seeds(0, prompts(["c", "a", "b"])), strict=True))
    assert first == second


def test_a_batch_without_uids_names_their_producer() -> None:
    data = DataProto.from_dict(
        non_tensors={"index": np.array([0], dtype=object)}, meta_info={"global_steps": 0, "validate": False}
    )
    with pytest.raises(KeyError, match="uid"):
        sample_seeds(0, data)

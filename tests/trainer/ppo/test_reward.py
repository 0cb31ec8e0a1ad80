"""Loading a reward function and applying it to responses."""

import asyncio
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from verl.config import RewardFunctionConfig
from verl.protocol import DataProto
from verl.trainer.ppo.reward import compute_rewards, load_reward_fn


class LetterTokenizer:
    """Id 0 is padding and special, 1 the end and special, the others letters from ``a`` = 2 on."""

    name_or_path, chat_template, pad_token_id, eos_token_id = "nowhere", None, 0, 1
    added_tokens_decoder: ClassVar = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert not skip_special_tokens, "item tokens may be special"
        return "".join(["<pad>", "<end>", *"abcdefgh"][token] for token in ids)


def responses() -> DataProto:
    """Responses ``ab<end>``, nothing, and ``cdef`` without an end; prompts of one token."""
    tensors = {
        "responses": torch.tensor([[2, 3, 1, 0], [0, 0, 0, 0], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
    }
    arrays = {"data_source": ["x", "y", "z"], "extra_info": [{"level": 1}, None, None], "__num_turns__": [2, 2, 3]}
    return DataProto.from_dict(tensors, arrays | {"reward_model": [{"ground_truth": "ab"}, {"ground_truth": ""}, None]})


def test_scores_are_at_the_last_token_of_each_response() -> None:
    calls = []

    def length(**call) -> float:
        calls.append(call)
        return len(call["solution_str"]) + 0.5

    rewarded = compute_rewards(responses(), LetterTokenizer(), length)
    assert rewarded.tensor("token_level_scores").tolist() == [[0, 0, 2.5, 0], [0.5, 0, 0, 0], [0, 0, 0, 4.5]]
    assert rewarded.array("reward_extra").tolist() == [{}, {}, {}]
    extra = {"level": 1, "num_turns": 2, "response_length": 3}
    assert calls[0] == {"data_source": "x", "solution_str": "ab", "ground_truth": "ab", "extra_info": extra}
    assert calls[2]["ground_truth"] is None


def test_a_mapping_reports_more_than_the_score() -> None:
    def graded(solution_str: str, **_) -> dict:
        return {"score": 1} if not solution_str else {"score": np.float64(2), "correct": solution_str == "ab"}

    rewarded = compute_rewards(responses(), LetterTokenizer(), graded)
    assert rewarded.tensor("token_level_scores").sum(-1).tolist() == [2, 1, 2]
    assert rewarded.array("reward_extra").tolist() == [{"correct": True}, {}, {"correct": False}]


def test_results_without_a_score_are_refused() -> None:
    for result in ({"acc": 1}, {"score": None}, "high", float("inf")):
        with pytest.raises(
            ValueError, match=f"{result!r} for row 0; it must be a finite number, or a mapping that holds"
        ):
            compute_rewards(responses(), LetterTokenizer(), lambda result=result, **_: result)


async def test_calls_of_an_async_function_wait_side_by_side() -> None:
    waiting = asyncio.Barrier(3)

    async def together(ground_truth: str, **_) -> dict:
        async with asyncio.timeout(20):
            await waiting.wait()  # goes on once all three calls wait
        return {"score": len(ground_truth or "none"), "who": ground_truth}

    rewarded = await asyncio.to_thread(compute_rewards, responses(), LetterTokenizer(), together)
    assert rewarded.tensor("token_level_scores").sum(-1).tolist() == [2, 4, 4]
    assert [extra["who"] for extra in rewarded.array("reward_extra")] == ["ab", "", None]


def test_loading_by_path(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def compute_score(**_): return 1.0\ndef other(**_): return 2.0\nLIMIT = 3\n")
    for name, value in (("compute_score", 1.0), ("other", 2.0)):
        function = load_reward_fn(RewardFunctionConfig(path=str(path), name=name))
        assert function is not None and function() == value
    assert load_reward_fn(RewardFunctionConfig()) is None
    with pytest.raises(ValueError, match=r"custom_reward_function.path=.*defines no 'absent'; it defines .*other"):
        load_reward_fn(RewardFunctionConfig(path=str(path), name="absent"))


def test_arguments_of_every_call(tmp_path: Path) -> None:
    path = tmp_path / "scaled.py"
    path.write_text("async def scaled(solution_str, ground_truth, scale, **_): return scale * len(solution_str)\n")
    function = load_reward_fn(RewardFunctionConfig(path=str(path), name="scaled", reward_kwargs={"scale": 3}))
    assert compute_rewards(responses(), LetterTokenizer(), function).tensor("token_level_scores").sum() == 18
    for kwargs, message in (({}, "'scale'"), ({"scale": 1, "extra_info": 2}, "multiple values for .*'extra_info'")):
        with pytest.raises(ValueError, match=rf"name='scaled' in .*{message}; it is called with .*reward_kwargs="):
            load_reward_fn(RewardFunctionConfig(path=str(path), name="scaled", reward_kwargs=kwargs))

"""Padding of finished conversations into batch tensors, and their figures."""

import pytest
import torch

from verl.experimental.agent_loop.base import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.rows import pad_outputs, summarise
from verl.protocol import BATCH_KEYS

PAD = 9


def output(prompt: list[int], response: list[int], mask: list[int], special: list[int], log_probs=None):
    return AgentLoopOutput(prompt, response, mask, special, log_probs, 2, AgentLoopMetrics(), 0)


def test_every_tensor_of_two_rows_by_hand() -> None:
    rows = [
        output([1, 2], [3, 4, 5], [1, 1, 0], [0, 1, 0], [-0.5, -1.0, -2.0]),
        output([1, 2, 3], [], [], [], []),
    ]
    tensors = pad_outputs(rows, prompt_length=3, response_length=4, pad_token_id=PAD)
    expected = {
        "prompts": [[PAD, 1, 2], [1, 2, 3]],
        "responses": [[3, 4, 5, PAD], [PAD] * 4],
        "response_mask": [[1, 1, 0, 0], [0] * 4],
        "distill_special_token_mask": [[0, 1, 0, 0], [0] * 4],
        "input_ids": [[PAD, 1, 2, 3, 4, 5, PAD], [1, 2, 3, PAD, PAD, PAD, PAD]],
        "attention_mask": [[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]],
        "position_ids": [[0, 0, 1, 2, 3, 4, 4], [0, 1, 2, 2, 2, 2, 2]],
        "rollout_log_probs": [[-0.5, -1.0, -2.0, 0.0], [0.0] * 4],
    }
    assert {key: value.tolist() for key, value in tensors.items()} == expected


def test_dtypes_are_those_of_the_batch_table() -> None:
    tensors = pad_outputs([output([1], [2], [1], [0], [-1.0])], 2, 2, PAD)
    assert {key: str(value.dtype) for key, value in tensors.items()} == {
        key: f"torch.{BATCH_KEYS[key].dtype}" for key in tensors
    }


def test_without_log_probs_there_is_no_such_tensor() -> None:
    assert "rollout_log_probs" not in pad_outputs([output([1], [2], [1], [0])], 2, 2, PAD)


def test_a_pad_id_above_the_threshold_is_never_marked() -> None:
    tensors = pad_outputs([output([1], [2], [1], [0])], 2, 3, pad_token_id=10**6)
    assert torch.equal(tensors["distill_special_token_mask"], torch.zeros(1, 3, dtype=torch.int64))


def test_figures_of_a_batch() -> None:
    metrics = [
        AgentLoopMetrics(generate_s=1.0, tool_calls_s=0.5, tool_calls=2, tool_errors=1, tool_reward=1.0),
        AgentLoopMetrics(generate_s=3.0, tool_calls_s=0.0, tool_calls=1, dropped_calls=2, retried_requests=2),
    ]
    plain = summarise(metrics, with_tools=False)
    seconds = {f"timing_s/agent_loop/generate_sequences/{k}": v for k, v in (("min", 1), ("mean", 2), ("max", 3))}
    assert plain == {**seconds, "agent_loop/retried_requests": 2}
    with_tools = summarise(metrics, with_tools=True)
    assert with_tools["agent_loop/tool_calls"] == 3
    assert with_tools["agent_loop/tool_errors"] == 1
    assert with_tools["agent_loop/dropped_calls"] == 2
    assert with_tools["agent_loop/tool_reward/mean"] == pytest.approx(0.5)
    assert with_tools["timing_s/agent_loop/tool_calls/max"] == pytest.approx(0.5)

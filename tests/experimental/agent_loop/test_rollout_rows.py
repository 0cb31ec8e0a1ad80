"""Rows to conversations and back: seeds and sampling parameters; padding into batch tensors; metrics of a batch."""

from support.agent_loop_fakes import prompt_rows

from verl.config import RolloutConfig, SamplingConfig
from verl.experimental.agent_loop.base import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.worker import batch_metrics, pad_outputs, sample_seeds, sampling_params
from verl.protocol import BATCH_KEYS

PAD = 9


def test_training_and_validation_sample_by_their_own_settings() -> None:
    training = {"temperature": 1.1, "top_p": 0.95, "top_k": 200}
    validation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    config = RolloutConfig(**training, calculate_log_probs=True, val_kwargs=SamplingConfig(**validation))
    shared = {"ignore_eos": False, "logprobs": True}
    assert sampling_params(config, validate=False) == training | shared
    assert sampling_params(config, validate=True) == validation | shared
    config.val_kwargs.do_sample = False
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
    assert sampling_params(config, validate=True) == greedy | shared


def test_seeds_tell_answers_prompts_steps_and_runs_apart() -> None:
    rows, seeds = prompt_rows(uid="aaba"), []
    for seed, step, validate in ((0, 1, False), (0, 2, False), (0, 1, True), (1, 1, False)):
        rows.meta_info = {"global_steps": step, "validate": validate}
        seeds += sample_seeds(seed, rows)
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)


def output(prompt: list[int], response: list[int], mask: list[int], special: list[int], log_probs=None):
    return AgentLoopOutput(prompt, response, mask, special, log_probs, 2, AgentLoopMetrics(), 0)


def test_every_tensor_of_two_rows_by_hand() -> None:
    rows = [output([1, 2], [3, 4, 5], [1, 1, 0], [0, 1, 0], [-0.5, -1.0, -2.0]), output([1, 2, 3], [], [], [], [])]
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
    dtypes = {key: str(value.dtype) for key, value in tensors.items()}
    assert dtypes == {key: f"torch.{BATCH_KEYS[key].dtype}" for key in tensors}


def test_metrics_of_a_batch() -> None:
    counts = {"tool_calls": 3, "tool_errors": 1, "unknown_tools": 0, "malformed_calls": 0, "dropped_calls": 2}
    counts |= {"rewritten_turns": 1, "typed_special_tokens": 2}
    measured = {name: [count, 0.0] for name, count in counts.items()}
    measured |= {"generate_s": [1.0, 3.0], "tool_calls_s": [0.5, 0.0], "tool_reward": [1.0, 0.0]}
    measured |= {"retried_requests": [0, 2], "unwritten_tokens": [7, 5]}
    seconds = {f"timing_s/agent_loop/generate_sequences/{k}": v for k, v in (("min", 1), ("mean", 2), ("max", 3))}
    without_tools = {**seconds, "agent_loop/retried_requests": 2, "agent_loop/unwritten_tokens": 12}
    assert batch_metrics(measured, with_tools=False) == without_tools
    assert batch_metrics(measured, with_tools=True) == without_tools | {
        **{f"agent_loop/{name}": value for name, value in counts.items()},
        **{f"agent_loop/tool_reward/{k}": v for k, v in (("min", 0), ("mean", 0.5), ("max", 1))},
        **{f"timing_s/agent_loop/tool_calls/{k}": v for k, v in (("min", 0), ("mean", 0.25), ("max", 0.5))},
    }

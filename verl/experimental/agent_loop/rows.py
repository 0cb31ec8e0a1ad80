"""Rows of a batch to conversations and back.

In: a batch of prompts and the rollout settings; finished conversations (``AgentLoopOutput``). Out: sampling parameters
of the batch with one seed per row; the rollout's tensors of ``verl/protocol.py`` and one flat dict of metrics.

A seed comes from the run's seed, the step, the row's ``uid`` and its number among the answers to that prompt, so
neither the number of agent-loop workers nor the order of the prompts changes a sample.
Prompts are padded on the left and responses on the right to fixed lengths; padding is 0 in every mask and float tensor.
B conversations, P prompt, R response, T = P + R.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from verl.config import RolloutConfig
from verl.experimental.agent_loop.base import AgentLoopOutput
from verl.protocol import DataProto

SEED_KEY = "sample_seed"
"""Column that carries the seeds from the manager to the agent-loop workers."""


def sampling_params(rollout: RolloutConfig, validate: bool) -> dict[str, Any]:
    """Sampling parameters for training, or for validation (``rollout.val_kwargs``); ``seed`` comes with each row."""
    settings = rollout.val_kwargs if validate else rollout
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    if validate and not rollout.val_kwargs.do_sample:
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
    return {**sampling, "ignore_eos": rollout.ignore_eos, "logprobs": rollout.calculate_log_probs}


def sample_seeds(seed: int, prompts: DataProto) -> list[int]:
    """One seed per row, below 2^31."""
    step, validate = prompts.meta_info["global_steps"], bool(prompts.meta_info["validate"])
    answers: Counter[Any] = Counter()
    seeds = []
    for uid in prompts.array("uid"):
        text = f"{seed}|{step}|{validate}|{uid}|{answers[uid]}"
        answers[uid] += 1
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)
    return seeds


def pad_outputs(
    outputs: Sequence[AgentLoopOutput], prompt_length: int, response_length: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The tensors of ``outputs``, row by row.

    Returns:
        ``prompts`` (B, P), ``responses``, ``response_mask``, ``distill_special_token_mask`` (B, R), ``input_ids``,
        ``attention_mask``, ``position_ids`` (B, T), all int64; ``rollout_log_probs`` (B, R) float32 where every output
        has log-probs.
    """
    prompts = _pad([output.prompt_ids for output in outputs], prompt_length, pad_token_id, left=True)
    responses = _pad([output.response_ids for output in outputs], response_length, pad_token_id)
    prompt_lengths = torch.tensor([len(output.prompt_ids) for output in outputs])[:, None]
    response_lengths = torch.tensor([len(output.response_ids) for output in outputs])[:, None]
    in_prompt = torch.arange(prompt_length) >= prompt_length - prompt_lengths
    attention_mask = torch.cat([in_prompt, torch.arange(response_length) < response_lengths], dim=1).long()
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": _pad([output.response_mask for output in outputs], response_length, 0),
        "distill_special_token_mask": _pad([o.distill_special_token_mask for o in outputs], response_length, 0),
        "input_ids": torch.cat([prompts, responses], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    log_probs = [output.response_logprobs for output in outputs if output.response_logprobs is not None]
    if len(log_probs) == len(outputs):
        tensors["rollout_log_probs"] = _pad(log_probs, response_length, 0.0)
    return tensors


def _pad(
    rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], length: int, pad: int | float, *, left: bool = False
) -> torch.Tensor:
    dtype = torch.float32 if isinstance(pad, float) else torch.int64
    padded = torch.full((len(rows), length), pad, dtype=dtype)
    for number, row in enumerate(rows):
        start = length - len(row) if left else 0
        padded[number, start : start + len(row)] = torch.tensor(row, dtype=dtype)
    return padded


def batch_metrics(measured: Mapping[str, Sequence[float]], with_tools: bool) -> dict[str, float]:
    """Metrics of a batch; those of tools only where there are tools.

    Args:
        measured: per field of ``AgentLoopMetrics`` one value per conversation.
    """
    spreads = {"timing_s/agent_loop/generate_sequences": "generate_s"}
    counts = ["retried_requests"]
    if with_tools:
        spreads |= {"timing_s/agent_loop/tool_calls": "tool_calls_s", "agent_loop/tool_reward": "tool_reward"}
        counts += ["tool_calls", "tool_errors", "unknown_tools", "malformed_calls", "dropped_calls"]
    metrics = {f"agent_loop/{name}": float(sum(measured[name])) for name in counts}
    for name, field in spreads.items():
        values = measured[field]
        metrics |= {f"{name}/min": min(values), f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values)}
    return metrics

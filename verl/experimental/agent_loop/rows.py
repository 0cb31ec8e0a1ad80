"""Finished conversations to batch tensors, and their figures.

In: ``AgentLoopOutput`` objects. Out: the rollout's tensors of ``verl/protocol.py`` and one flat dict of metrics.
Prompts are padded on the left and responses on the right to fixed lengths; padding is 0 in every mask and float tensor.
B conversations, P prompt, R response, T = P + R.
"""

from collections.abc import Sequence

import torch

from verl.experimental.agent_loop.base import AgentLoopMetrics, AgentLoopOutput


def pad_outputs(
    outputs: Sequence[AgentLoopOutput], prompt_length: int, response_length: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The tensors of ``outputs``, row by row.

    Returns:
        ``prompts`` (B, P), ``responses``, ``response_mask``, ``distill_special_token_mask`` (B, R), ``input_ids``,
        ``attention_mask``, ``position_ids`` (B, T), all int64; ``rollout_log_probs`` (B, R) float32 where every output
        has log-probs.
    """
    prompts = _rows([output.prompt_ids for output in outputs], prompt_length, pad_token_id, left=True)
    responses = _rows([output.response_ids for output in outputs], response_length, pad_token_id)
    attention_mask = torch.cat(
        [
            _rows([[1] * len(output.prompt_ids) for output in outputs], prompt_length, 0, left=True),
            _rows([[1] * len(output.response_ids) for output in outputs], response_length, 0),
        ],
        dim=1,
    )
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": _rows([output.response_mask for output in outputs], response_length, 0),
        "distill_special_token_mask": _rows(
            [output.distill_special_token_mask for output in outputs], response_length, 0
        ),
        "input_ids": torch.cat([prompts, responses], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    log_probs = [output.response_logprobs for output in outputs if output.response_logprobs is not None]
    if len(log_probs) == len(outputs):
        tensors["rollout_log_probs"] = _rows(log_probs, response_length, 0.0)
    return tensors


def summarise(metrics: Sequence[AgentLoopMetrics], with_tools: bool) -> dict[str, float]:
    """Seconds over the conversations of a batch (min, mean, max), requests that were asked again after a replica that
    hung, and, where there are tools, how their calls went.
    """
    figures = _spread("timing_s/agent_loop/generate_sequences", [row.generate_s for row in metrics])
    figures["agent_loop/retried_requests"] = float(sum(row.retried_requests for row in metrics))
    if not with_tools:
        return figures
    figures |= _spread("timing_s/agent_loop/tool_calls", [row.tool_calls_s for row in metrics])
    for name in ("tool_calls", "tool_errors", "unknown_tools", "malformed_calls", "dropped_calls"):
        figures[f"agent_loop/{name}"] = float(sum(getattr(row, name) for row in metrics))
    return figures | _spread("agent_loop/tool_reward", [row.tool_reward for row in metrics])


def _rows(
    rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], length: int, pad: int | float, *, left: bool = False
) -> torch.Tensor:
    dtype = torch.float32 if isinstance(pad, float) else torch.int64
    padded = torch.full((len(rows), length), pad, dtype=dtype)
    for number, row in enumerate(rows):
        assert len(row) <= length, f"a row of {len(row)} tokens does not fit into {length}"
        if row:
            where = slice(length - len(row), length) if left else slice(0, len(row))
            padded[number, where] = torch.tensor(row, dtype=dtype)
    return padded


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/min": min(values), f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values)}

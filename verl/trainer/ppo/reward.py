"""Task rewards: a user's function applied to every answer.

In:  a batch after generation, and a function ``(data_source, solution_str, ground_truth, extra_info)``.
Out: ``token_level_scores`` (B, R), zero but for one position a row, and ``reward_extra`` (B,).
Not here: rewards as advantages, KL penalties.

Letters: B sequences, R response tokens.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl.config.ppo import RewardFunctionConfig
from verl.protocol import DataProto
from verl.utils.import_utils import load_extern_type
from verl.utils.redaction import redacted
from verl.utils.tokenizer import answer_text
from verl.utils.torch_functional import real_response_tokens

RewardFn = Callable[..., Any]
"""Called with the keywords ``data_source``, ``solution_str``, ``ground_truth`` and ``extra_info``; returns a number, or
a mapping with the number as ``score`` and anything else to report. May be ``async``."""

KEYWORDS = ("data_source", "solution_str", "ground_truth", "extra_info")
MOST_AT_ONCE = 256
"""Calls of an ``async`` function that wait at the same time, below what a server or open files usually allow."""


def load_reward_fn(config: RewardFunctionConfig) -> RewardFn | None:
    """The function that ``custom_reward_function.path`` and ``.name`` (default ``compute_score``) give, or None.

    It gets ``custom_reward_function.reward_kwargs`` in every call.

    Raises:
        ValueError: no such file or name, or what it names cannot be called in this way.
    """
    if config.path is None:
        return None
    name = config.name or "compute_score"
    try:
        function = load_extern_type(config.path, name)
    except ValueError as error:
        raise ValueError(f"custom_reward_function.path={config.path}: {error}") from error
    try:
        inspect.signature(function).bind(**dict.fromkeys(KEYWORDS), **config.reward_kwargs)
    except TypeError as error:
        raise ValueError(
            f"custom_reward_function.name={name!r} in {config.path}: {error}; it is called with the keywords "
            f"{', '.join(KEYWORDS)} and those of custom_reward_function.reward_kwargs={redacted(config.reward_kwargs)}"
        ) from error
    return partial(function, **config.reward_kwargs)


async def _await_all(results: Sequence[Any]) -> list[Any]:
    limit = asyncio.Semaphore(MOST_AT_ONCE)

    async def wait(result: Any) -> Any:
        async with limit:
            return await result if inspect.isawaitable(result) else result

    return await asyncio.gather(*map(wait, results))


def _score_and_extra(result: Any, row: int) -> tuple[float, dict[str, Any]]:
    extra = dict(result) if isinstance(result, Mapping) else {"score": result}
    try:
        number = float(extra.pop("score"))
    except (KeyError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        form = "it must be a finite number, or a mapping that holds one as 'score'"
        raise ValueError(f"the reward function returned {result!r} for row {row}; {form}")
    return number, extra


def compute_rewards(batch: DataProto, tokenizer: PreTrainedTokenizerBase, reward_fn: RewardFn) -> DataProto:
    """Score every answer.

    The function sees the response as text (`answer_text`), the row's ``data_source`` (None where it has none),
    ``reward_model["ground_truth"]`` (likewise), and a copy of ``extra_info`` with ``num_turns`` and
    ``response_length``, the response's tokens, those of tools included. Calls of an ``async`` function wait side by
    side; others run one after the other, in the main thread, because some set signal handlers.

    Args:
        batch: with ``responses``, ``attention_mask``.
        tokenizer: decodes the responses.
        reward_fn: see `RewardFn`.

    Returns:
        ``token_level_scores`` (B, R) float32, each at its response's last token, tools' tokens included (of an empty
        response: at position 0); ``reward_extra`` (B,), a mapping of what else the function returned for the row.

    Raises:
        ValueError: the function returned no finite number.
    """
    responses, written = batch.tensor("responses"), real_response_tokens(batch)
    scores = torch.zeros(responses.shape, dtype=torch.float32)
    lengths = written.sum(dim=-1).tolist()
    results, reported = [], np.empty(len(batch), dtype=object)
    for row in range(len(batch)):
        columns = {key: values[row] for key, values in batch.non_tensor_batch.items()}
        extra_info = dict(columns.get("extra_info") or {}, response_length=lengths[row])
        if "__num_turns__" in columns:
            extra_info["num_turns"] = int(columns["__num_turns__"])
        given = (
            columns.get("data_source"),
            answer_text(tokenizer, responses[row][written[row]].tolist()),
            (columns.get("reward_model") or {}).get("ground_truth"),
            extra_info,
        )
        results.append(reward_fn(**dict(zip(KEYWORDS, given, strict=True))))
    if any(map(inspect.isawaitable, results)):
        results = asyncio.run(_await_all(results))
    for row, result in enumerate(results):
        score, reported[row] = _score_and_extra(result, row)
        scores[row, max(lengths[row] - 1, 0)] = score
    return DataProto.from_dict({"token_level_scores": scores}, {"reward_extra": reported})

"""A reward of one's own: 1 for the exact answer, and a small part for an answer of one line.

    python -m examples.tiny custom_reward_function.path=examples/reward.py \
        algorithm.adv_estimator=grpo algorithm.distill.coef=0.5 actor_rollout_ref.rollout.n=2

`custom_reward_function.reward_kwargs.format_part=0.2` sets the argument of that name. Where it waits for a server,
write `async def`: up to 256 calls then wait side by side.
"""

from typing import Any


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: dict[str, Any] | None = None,
    format_part: float = 0.1,
) -> dict[str, float]:
    """The reward of one answer as ``score``; whatever else is returned becomes a metric ``reward_extra/<source>/...``.

    Args:
        data_source: the row's source, for a file that treats sources differently.
        solution_str: what the model wrote, without the tokens that end a turn; item tokens stay.
        ground_truth: the wanted answer: the assistant's, at a chat's end, or verl's ``reward_model["ground_truth"]``.
        extra_info: the row's own, with ``response_length`` (tokens) and ``num_turns``.
    """
    answer = solution_str.rpartition("</think>")[2].strip()
    if ground_truth is None:  # such as a chat: nothing to reward
        return {"score": 0.0, "acc": 0.0, "one_line": 0.0}
    is_right = answer.casefold() == ground_truth.strip().casefold()
    is_one_line = bool(answer) and "\n" not in answer
    return {"score": is_right + format_part * is_one_line, "acc": float(is_right), "one_line": float(is_one_line)}

"""An objective of one's own: an advantage that weighs the first tokens of an answer more than the later ones.

    python -m examples.tiny actor_rollout_ref.model.external_lib=examples/objective.py \
        algorithm.adv_estimator=first_tokens custom_reward_function.path=examples/reward.py \
        algorithm.distill.coef=0.5 actor_rollout_ref.rollout.n=2

Every process of the run imports the file; `VERL_USE_EXTERNAL_MODULES=examples/objective.py` does the same. An estimator
of one's own learns from a reward, and `algorithm.distill.coef` adds distillation to it.
"""

from typing import Any

import numpy as np
import torch

from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

DECAY = 0.9
"""Weight of a token beside that of the trained token before it."""


@register_adv_est("first_tokens")
def first_tokens(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A_t = DECAY^(trained tokens before t) x (reward - mean of the prompt's answers)``, 0 at tokens not trained.

    The names of the arguments choose what an estimator gets: any tensor of the batch by its key (``old_log_probs``,
    ``ref_log_prob``, ...; ``verl/protocol.py`` lists them), ``index`` for the prompt of each row, ``config`` for
    ``algorithm.*``.

    Args:
        token_level_rewards: (B, R) the reward of each answer, at its last token.
        response_mask: (B, R) 1 at trained tokens.
        index: (B,) equal for the answers to one prompt.

    Returns:
        advantages and returns, (B, R).
    """
    centred, _ = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False
    )
    earlier = response_mask.cumsum(dim=-1) - response_mask
    advantages = centred * DECAY**earlier
    return advantages, advantages.clone()

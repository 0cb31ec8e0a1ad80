"""How a batch meets an estimator: inputs by name, missing keys, KL in the reward, importance weights."""

import math

import numpy as np
import pytest
import torch

from verl.config import AlgoConfig, KLControlConfig, RolloutCorrectionConfig
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.advantage import apply_kl_penalty, compute_advantage, compute_rollout_is_weights
from verl.trainer.ppo.core_algos import get_kl_controller, register_adv_est

NAN = float("nan")


def distill_batch() -> DataProto:
    """Two rows of three tokens; row 1 leaks at its second token, whose log-prob the teacher does not know."""
    tensors = {
        "old_log_probs": [[-1.0, -2.0, -3.0], [-1.0, -0.5, NAN]],
        "ref_log_prob": [[-2.0, -1.0, -3.0], [-0.5, -100.0, NAN]],
        "response_mask": [[1, 1, 1], [1, 1, 0]],
        "distill_special_token_mask": [[0, 0, 0], [0, 1, 0]],
    }
    arrays = {"uid": ["a", "a"]}
    return DataProto.from_dict({key: torch.tensor(rows) for key, rows in tensors.items()}, arrays, {"temperature": 1.0})


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0)


def test_distillation_advantage_with_both_clips() -> None:
    batch = distill_batch()
    config = AlgoConfig(adv_estimator="on_policy_distill", distill_adv_min_clip=-30.0, distill_adv_max_clip=0.75)
    result = compute_advantage(batch, "on_policy_distill", config=config)
    # Row 0: -1, 1 -> 0.75, 0. Row 1: 0.5, then -99.5 -> -30 at the leak, nothing after it.
    close(result.batch["advantages"], [[-1.0, 0.75, 0.0], [0.5, -30.0, 0.0]])
    assert result.meta_info == {"temperature": 1.0}
    assert "advantages" not in batch.batch, "the given batch stays as it is"


def test_scores_stand_in_for_rewards() -> None:
    batch = distill_batch()
    batch.batch["token_level_scores"] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    result = compute_advantage(batch, "grpo", norm_adv_by_std_in_grpo=False)
    close(result.batch["advantages"], [[-1.0, -1.0, -1.0], [1.0, 1.0, 0.0]])
    close(result.batch["token_level_rewards"], [[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])


def test_gamma_reaches_an_estimator_that_discounts() -> None:
    batch = distill_batch()
    batch.batch["token_level_rewards"] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
    by_argument = compute_advantage(batch, "reinforce_plus_plus", gamma=0.5)
    by_config = compute_advantage(batch, "reinforce_plus_plus", config=AlgoConfig(gamma=0.5))
    # Row 1: the reward lies after its two trained tokens and counts whole for the last of them.
    for result in (by_argument, by_config):
        close(result.batch["returns"], [[0.25, 0.5, 1.0], [1.0, 2.0, 0.0]])


def test_an_estimator_of_ones_own_gets_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", {})

    @register_adv_est("own")
    def own(response_mask, index, distill_special_token_mask=None, absent=None, config=None, **kwargs):
        assert list(index) == ["a", "a"]
        assert absent is None
        assert kwargs == {}
        advantages = response_mask.float() * config.gamma - distill_special_token_mask
        return advantages, advantages

    result = compute_advantage(distill_batch(), "own", config=AlgoConfig(gamma=0.5))
    close(result.batch["advantages"], [[0.5, 0.5, 0.5], [0.5, -0.5, 0.0]])


def test_missing_inputs_and_a_missing_kl_penalty_are_refused() -> None:
    batch = distill_batch()
    batch.pop(batch_keys=["ref_log_prob"])
    for name, missing in (("on_policy_distill", r"'ref_log_prob' \(made by: teacher"), ("grpo", "'token_level_sc")):
        with pytest.raises(KeyError, match=missing):
            compute_advantage(batch, name)
    batch.batch["token_level_scores"] = torch.zeros(2, 3)
    with pytest.raises(KeyError, match=r"lacks .token_level_rewards. \(made by: advantage\)"):
        compute_advantage(batch, "grpo", config=AlgoConfig(use_kl_in_reward=True))


def test_kl_penalty_comes_off_where_the_reference_knows_the_token() -> None:
    batch = distill_batch()
    batch.batch["token_level_scores"] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    controller = get_kl_controller(KLControlConfig(type="adaptive", kl_coef=0.1, target_kl=1.0, horizon=10))
    rewarded, metrics = apply_kl_penalty(batch, controller, "kl")
    # KL: 1, -1, 0 in row 0; -0.5 in row 1, whose second token is in E and whose third is not trained.
    close(rewarded.batch["token_level_rewards"], [[-0.1, 0.1, 1.0], [0.05, 2.0, 0.0]])
    # Means of the rows: 0 and -0.5; of both: -0.25. Error clipped to -0.2: 0.1 * (1 - 0.2 * 2 / 10).
    assert metrics == {"actor/reward_kl_penalty": pytest.approx(-0.25), "actor/reward_kl_penalty_coeff": 0.1}
    assert controller.value == pytest.approx(0.096)
    assert "token_level_rewards" not in batch.batch


def test_kl_penalty_counts_item_tokens_of_a_teacher_that_knows_them() -> None:
    batch = distill_batch()
    batch.batch["token_level_scores"] = torch.zeros(2, 3)
    batch.batch["ref_log_prob"][1, 1] = batch.batch["old_log_probs"][1, 1] - 3.0
    controller = get_kl_controller(KLControlConfig(type="fixed", kl_coef=0.1))
    batch.non_tensor_batch["teacher_knows_extended"] = np.array([False, True], dtype=object)
    rewarded, _ = apply_kl_penalty(batch, controller, "kl")
    close(rewarded.batch["token_level_rewards"], [[-0.1, 0.1, 0.0], [0.05, -0.3, 0.0]])


def test_importance_weights_are_ratios_cut_at_the_threshold() -> None:
    batch = distill_batch()
    # policy / sampler: e^-1 (kept), e^2 -> 2 (cut), 1; e^0.5, 1, and nothing at a token that is not trained.
    batch.batch["rollout_log_probs"] = torch.tensor([[0.0, -4.0, -3.0], [-1.5, -0.5, -7.0]])
    weights = compute_rollout_is_weights(batch, RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=2.0))
    assert list(weights.batch.keys()) == ["rollout_is_weights"]
    close(weights.batch["rollout_is_weights"], [[math.exp(-1), 2.0, 1.0], [math.exp(0.5), 1.0, 0.0]])


@pytest.mark.parametrize("top_p", [0.95, 0.8])
def test_weights_do_not_turn_the_gradient_of_a_sampler_that_is_cut(top_p: float) -> None:
    """They are the kept mass at every token of a position: the direction stays that of the cut sampler's gradient."""
    logits = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)).double()
    policy, teacher = (logits * torch.tensor([[0.5], [3.0]])).softmax(-1)
    order = policy.argsort(descending=True)
    kept = order[: int((policy[order].cumsum(-1) < top_p).sum()) + 1]
    mass, advantage = policy[kept].sum(), (teacher / policy).log()
    sampler = policy[kept] / mass
    rows = {"old_log_probs": policy[kept].log(), "rollout_log_probs": sampler.log(), "response_mask": sampler > 0}
    batch = DataProto.from_dict({name: row[None].float() for name, row in rows.items()})
    config = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=2.0)
    weights = compute_rollout_is_weights(batch, config).batch["rollout_is_weights"][0].double()
    torch.testing.assert_close(weights, mass.expand(len(kept)), atol=1e-6, rtol=0)
    slopes = torch.eye(400).double() - policy  # of log p over the logits
    right = (policy * advantage) @ slopes
    cut, weighted = ((sampler * weight * advantage[kept]) @ slopes[kept] for weight in (torch.ones(1), weights))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(right, weighted, 0), cosine(right, cut, 0), atol=1e-6, rtol=0)
    assert cosine(right, cut, 0) < 0.99

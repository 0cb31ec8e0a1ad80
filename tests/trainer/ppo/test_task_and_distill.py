"""A task reward beside distillation: whose advantage is whose, worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from support.loop_fakes import bare_trainer

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
from verl.config import AlgoConfig, DistillConfig, PPOConfig, RolloutCorrectionConfig, TeacherConfig, TrainerConfig
from verl.config.algorithm import KLControlConfig
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_kl_controller
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

NAN = float("nan")
STUDENT = torch.tensor([[-1.0, -2.0, NAN], [-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0], [-2.0, -1.0, NAN]])
TEACHER = torch.tensor([[-3.0, -100.0, NAN], [-0.5, -2.0, -1.0], [-2.0, -0.5, -1.5], [-1.0, -5.0, NAN]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
# Held to [-30, 1.5]: row 0 leaks an item token at its second position, rows 2 and 3 belong to the second teacher.


def batch_of(scores: list[float]) -> DataProto:
    """Two prompts with two answers each; the rows of prompt b belong to the second teacher, which knows items."""
    rewards = torch.zeros(4, 3)
    rewards[:, 2] = torch.tensor(scores)
    tensors = {"old_log_probs": STUDENT, "ref_log_prob": TEACHER, "response_mask": MASK, "token_level_scores": rewards}
    tensors["teacher"] = torch.tensor([0, 0, 1, 1])
    return DataProto.from_dict(tensors, {"uid": np.array(["a", "a", "b", "b"], dtype=object)})


def algorithm(estimator: str = "grpo", coef: float | None = 0.5, weight: float = 2.0, **more: Any) -> AlgoConfig:
    distill = DistillConfig(coef=coef, teachers={"self": TeacherConfig(sources=["rec_*"], weight=weight)}, **more)
    bounds = {"distill_adv_min_clip": -30.0, "distill_adv_max_clip": 1.5}
    return AlgoConfig(adv_estimator=estimator, norm_adv_by_std_in_grpo=False, distill=distill, **bounds)


def trainer_of(settings: AlgoConfig, cls: type[RayPPOTrainer] = RayOnPolicyDistillTrainer) -> Any:
    return bare_trainer(PPOConfig(algorithm=settings), cls)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_both_advantages_are_added_token_by_token() -> None:
    weighed = trainer_of(algorithm()).advantage(batch_of([0.0, 1.0, 3.0, 1.0]))
    # GRPO without division: -0.5 and 0.5 for prompt a, 1 and -1 for b, at trained tokens. To it 0.5 x the base
    # teacher's part of rows 0 and 1, and 0.5 x 2 x the second's of rows 2 and 3.
    expected = torch.tensor([[-1.5, -15.5, 0.0], [0.75, 0.5, 1.25], [0.0, 1.5, 0.5], [0.0, -5.0, 0.0]])
    close(weighed.tensor("advantages"), expected)
    close(weighed.tensor("returns"), expected)
    # An exact divergence is a term of the loss instead.
    exact = trainer_of(algorithm(objective="exact")).advantage(batch_of([0.0, 1.0, 3.0, 1.0])).tensor("advantages")
    close(exact[0], torch.tensor([-0.5, -0.5, 0.0]))


PURE = {"estimator": "on_policy_distill", "coef": None}


@pytest.mark.parametrize(
    ("settings", "scores", "weighs"),
    [
        ({**PURE, "weight": 1.0}, True, True),
        ({**PURE, "objective": "topk"}, True, False),
        ({**PURE, "objective": "exact"}, False, False),
        ({"objective": "exact"}, False, True),
        ({"objective": "topk"}, True, True),
    ],
)
def test_which_stages_a_step_has(settings: dict[str, Any], scores: bool, weighs: bool) -> None:
    """Teachers score before the update where it does not run them, or where the task's part needs them."""
    trainer = trainer_of(algorithm(**settings))
    assert trainer.uses_reward == ("estimator" not in settings)
    assert (trainer.uses_reference, trainer.uses_advantage) == (scores, weighs)
    trainer.config.trainer = TrainerConfig(teacher_nnodes=1, teacher_n_gpus_per_node=1)
    assert (trainer.uses_reference, trainer.uses_advantage) == (True, weighs)


@pytest.mark.parametrize(
    ("changes", "distils", "rewards"),
    [
        ({}, True, True),
        ({"adv_estimator": "on_policy_distill"}, True, False),
        ({"adv_estimator": "of_entropy"}, False, False),
        ({"use_kl_in_reward": True}, False, False),
        ({"adv_estimator": "on_policy_distill", "rollout_correction": RolloutCorrectionConfig("token")}, False, False),
    ],
)
def test_what_needs_the_students_scores_before_the_update_has_them(
    changes: dict[str, Any], distils: bool, rewards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "of_entropy", lambda token_level_rewards, entropys=None: ...)
    for cls, expected in ((RayOnPolicyDistillTrainer, distils), (RayPPOTrainer, rewards)):
        own = type("Own", (cls,), {"advantage": lambda self, batch: DataProto()})
        for changed, epochs, steps in ((cls, 1, 1), (cls, 2, 1), (cls, 1, 2), (own, 1, 1)):
            trainer = trainer_of(algorithm(), changed)
            vars(trainer.config.algorithm).update(changes)
            actor = trainer.config.actor_rollout_ref.actor
            actor.ppo_epochs, trainer.config.data.train_batch_size = epochs, steps * actor.ppo_mini_batch_size
            assert trainer.student_scores_in_update == (expected and (changed, epochs, steps) == (cls, 1, 1))


def test_the_penalty_in_the_reward_is_of_the_estimator_that_is_set() -> None:
    settings = AlgoConfig("grpo", use_kl_in_reward=True, kl_penalty="abs", kl_ctrl=KLControlConfig(kl_coef=0.1))
    trainer = trainer_of(settings, RayPPOTrainer)
    trainer.kl_controller = get_kl_controller(settings.kl_ctrl)
    rewards = trainer.advantage(batch_of([0.0] * 4)).tensor("token_level_rewards")
    # Student less teacher in row 1: -0.5, 0 and -2.
    close(rewards[1], torch.tensor([-0.05, 0.0, -0.2]))

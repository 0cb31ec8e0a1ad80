"""Settings that speak of extended ids need an extension."""

import re

import pytest

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config

START = "actor_rollout_ref.rollout.extend_vocab_start_token"
FREEZE = "actor_rollout_ref.actor.freeze_extended_rows=True"


def load(*overrides: str) -> PPOConfig:
    return load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


@pytest.mark.parametrize(
    "setting",
    [
        FREEZE,
        "algorithm.distill.teachers.self.prompts=with_items",
        "algorithm.distill.support=shared",
        "algorithm.distill.leak_coef=1.0",
    ],
)
def test_they_are_refused_without_one(setting: str) -> None:
    expected = re.escape(setting) + " has no effect without extended ids"
    settings = (f"++{setting}", "algorithm.distill.objective=exact")
    with pytest.raises(ValueError, match=expected):
        load(*settings)
    for start in ("151669", "auto"):
        config = load(*settings, f"{START}={start}")
        config.resolve_extend_start(151669)
    with pytest.raises(ValueError, match=expected):
        config.resolve_extend_start(None)

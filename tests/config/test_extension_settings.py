"""Settings that need extended ids are refused without an extension, when typed and when ``auto`` is resolved."""

import re

import pytest

from verl.trainer.launch.typed import load_config

START = "actor_rollout_ref.rollout.extend_vocab_start_token"


@pytest.mark.parametrize(
    "setting",
    [
        *("actor_rollout_ref.actor.freeze_extended_rows=True", "algorithm.distill.teachers.self.vocabulary=stitched"),
        *("algorithm.distill.teachers.self.prompts=with_items", "algorithm.distill.leak_coef=1.0"),
        "algorithm.distill.support=shared",
    ],
)
def test_they_are_refused_without_one(setting: str) -> None:
    recipe = ("recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    overrides = [f"++{setting}", "algorithm.distill.objective=exact"]
    expected = re.escape(setting) + " has no effect without extended ids; set .*, or leave it at"
    with pytest.raises(ValueError, match=expected):
        load_config(overrides, *recipe)
    config = load_config([*overrides, f"{START}=auto"], *recipe)
    config.resolve_extend_start(151669)
    assert config.actor_rollout_ref.rollout.extend_start == 151669
    with pytest.raises(ValueError, match=expected):
        config.resolve_extend_start(None)

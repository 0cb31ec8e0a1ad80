"""The shipped YAML files say what the dataclasses say."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.tiny_pairs import REPO

from verl.config import PPOConfig
from verl.config.schema import all_keys, type_at
from verl.trainer.launch.typed import NO_EFFECT, load_config
from verl.trainer.ppo.core_algos import AdvantageEstimator

BASE = REPO / "verl/trainer/config/ppo_trainer.yaml"
RECIPES = sorted((REPO / "recipe").glob("*/config/*.yaml"))
DISTILL = ("recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings; an empty mapping is a value."""
    items: dict[str, Any] = {}
    for name, value in values.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return items


def read(path: Path, resolve: bool = False) -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.load(path), resolve=resolve))


def test_base_yaml_has_every_key_with_its_default_and_a_comment() -> None:
    assert load_config() == PPOConfig()
    ours = {key for key in read(BASE) if key.split(".")[0] not in ("defaults", "hydra")}
    assert ours == {key for key in all_keys(PPOConfig) if ".NAME." not in key}
    text, _, _ = BASE.read_text().partition("\nhydra:")
    lines = [line for line in text.splitlines()[4:] if line.strip() and not line.strip().startswith(("#", "- "))]
    assert [line for line in lines if " # " not in line and not line.rstrip().endswith(":")] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_differences(recipe: Path) -> None:
    base = read(BASE, resolve=True)
    own = {key: value for key, value in read(recipe).items() if key.split(".")[0] not in ("defaults", "hydra")}
    assert own and set(own) <= set(base)
    assert [key for key, value in own.items() if base[key] == value] == []


def test_distillation_defaults() -> None:
    config = load_config(["data.train_batch_size=6"], *DISTILL)
    assert config.algorithm.adv_estimator == str(AdvantageEstimator.ON_POLICY_DISTILL)
    assert (config.algorithm.distill_adv_min_clip, config.algorithm.distill_adv_max_clip) == (-30.0, 5.0)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 6, "follows the batch"


def test_lengths_and_limits_follow_the_key_a_user_sets() -> None:
    actor = ["ppo_max_token_len_per_gpu=200", "ref_log_prob_replace_val=-50"]
    overrides = ["data.max_prompt_length=64", *(f"actor_rollout_ref.actor.{setting}" for setting in actor)]
    models = load_config([*overrides, "data.max_response_length=32"]).actor_rollout_ref
    assert (models.rollout.prompt_length, models.rollout.response_length) == (64, 32)
    assert models.rollout.log_prob_max_token_len_per_gpu == models.ref.log_prob_max_token_len_per_gpu == 200
    assert models.ref.ref_log_prob_replace_val == -50.0


def test_keys_without_effect_are_not_keys_of_ours() -> None:
    assert [key for key in NO_EFFECT if type_at(PPOConfig, key.removesuffix(".*")) is not None] == []

"""The shipped YAML files say what the dataclasses say."""

import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.config.algorithm import ON_POLICY_DISTILL
from verl.config.schema import all_keys, nearest_keys, type_at
from verl.trainer.launch.checks import USUAL_ADV_BOUNDS
from verl.trainer.launch.no_effect import NO_EFFECT
from verl.trainer.launch.typed import load_config
from verl.trainer.ppo.core_algos import AdvantageEstimator

REPO = Path(__file__).resolve().parents[2]
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
    assert set(read(BASE)) == set(all_keys(PPOConfig))
    lines = [line for line in BASE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in lines if " # " not in line and not line.rstrip().endswith(":")] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_differences(recipe: Path) -> None:
    base = read(BASE, resolve=True)
    own = {key: value for key, value in read(recipe).items() if key.split(".")[0] not in ("defaults", "hydra")}
    assert own and set(own) <= set(base)
    assert [key for key, value in own.items() if base[key] == value] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_composes_from_any_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config([], ".".join(recipe.parent.relative_to(REPO).parts), recipe.stem)
    assert os.listdir(tmp_path) == []


def test_distillation_defaults() -> None:
    config = load_config(["data.train_batch_size=6"], *DISTILL)
    assert config.algorithm.adv_estimator == ON_POLICY_DISTILL == str(AdvantageEstimator.ON_POLICY_DISTILL)
    bounds = {name: getattr(config.algorithm, name) for name in USUAL_ADV_BOUNDS}
    assert bounds == USUAL_ADV_BOUNDS == {"distill_adv_min_clip": -30.0, "distill_adv_max_clip": 5.0}
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == 6, "follows the batch"


def test_lengths_and_limits_follow_the_key_a_user_sets() -> None:
    actor = [
        f"actor_rollout_ref.actor.{setting}"
        for setting in ("ppo_max_token_len_per_gpu=200", "ref_log_prob_replace_val=-50")
    ]
    models = load_config(["data.max_prompt_length=64", "data.max_response_length=32", *actor]).actor_rollout_ref
    assert (models.rollout.prompt_length, models.rollout.response_length) == (64, 32)
    assert models.rollout.log_prob_max_token_len_per_gpu == models.ref.log_prob_max_token_len_per_gpu == 200
    assert models.ref.ref_log_prob_replace_val == -50.0


def test_keys_without_effect_are_not_keys_of_ours() -> None:
    assert [key for key in NO_EFFECT if type_at(PPOConfig, key.removesuffix(".*")) is not None] == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data.max_promt_length", "data.max_prompt_length"),
        ("actor_rollout_ref.rollout.extend_vocab_start", "actor_rollout_ref.rollout.extend_vocab_start_token"),
        ("trainer.lr", "actor_rollout_ref.actor.optim.lr"),
        ("optim.weight_decay", "actor_rollout_ref.actor.optim.weight_decay"),
    ],
)
def test_nearest_key_comes_first(key: str, expected: str) -> None:
    assert nearest_keys(PPOConfig, key)[0] == expected

"""A launch line of verl's distillation recipe is accepted as it stands."""

import csv
import re

import pytest
from support.launch import reference_launch
from support.tiny_pairs import REPO

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config


@pytest.fixture(scope="module")
def config() -> PPOConfig:
    return load_config(reference_launch(), "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def test_values_arrive(config: PPOConfig) -> None:
    models, data = config.actor_rollout_ref, config.data
    assert (models.model.path, models.ref.model.path, config.trainer.logger) == ("STUDENT", "TEACHER", ["console"])
    assert (data.data_source_key, data.reward_fn_key, data.enable_think) == ("source", "source", True)
    assert (models.actor.clip_ratio_low, models.actor.clip_ratio_high, models.actor.optim.lr) == (0.2, 0.28, 5e-6)
    assert (models.rollout.prompt_length, models.rollout.response_length) == (10240, 2048)
    assert models.rollout.extend_vocab_start_token == 151669
    assert models.rollout.engine_kwargs["vllm"] == {"max_num_seqs": 64}
    assert (config.trainer.validation_data_dir, config.trainer.ray_timeline_dir) == ("OUT", "OUT/tmp_hostfile_dir")
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_TIMEOUT": "22",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512",
        "LD_LIBRARY_PATH": "/usr/lib:/opt/a+b/lib",
    }


@pytest.mark.parametrize("sign", ["+", "++"])
def test_the_whole_line_works_with_a_sign_before_every_key(config: PPOConfig, sign: str) -> None:
    signed = [sign + line.lstrip("+") for line in reference_launch()]
    assert load_config(signed, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer") == config


def test_the_line_holds_every_reference_key() -> None:
    table = REPO.parent / "shared" / "reference_keys.csv"
    if not table.is_file():
        pytest.skip("needs ../shared/reference_keys.csv, which the project does not ship")
    given = [line.split("=")[0] for line in reference_launch()]
    with table.open(newline="") as file:
        patterns = [re.sub(r"<\w+>", r"[A-Za-z_]+", row["key"].replace("+", r"\+")) for row in csv.DictReader(file)]
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, key) for key in given)] == []

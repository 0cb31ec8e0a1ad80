"""A launch line of verl's distillation recipe is accepted as it stands."""

import csv
import re
from pathlib import Path

import pytest

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config, normalized_argv

REPO = Path(__file__).resolve().parents[3]


def reference_launch() -> list[str]:
    lines = (REPO / "tests/data/reference_launch.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


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


def test_keys_without_effect_have_one_notice_each(caplog: pytest.LogCaptureFixture) -> None:
    normalized_argv(reference_launch())
    keys = ["data.image_key", "data.video_key", "data.return_raw_chat", "actor_rollout_ref.rollout.mode"]
    assert [notice.split()[0] for notice in caplog.messages] == [*keys, "trainer.default_hdfs_dir"]


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

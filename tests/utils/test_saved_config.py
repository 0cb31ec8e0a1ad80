"""The configuration as it is logged and saved."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config, to_typed
from verl.utils.redaction import public_dict, redacted, save_config

ENV = "ray_kwargs.ray_init.runtime_env.env_vars"


def test_it_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        ["trainer.logger=[console,file]", f"{ENV}.N=2", "ray_kwargs.ray_init.num_cpus=2", "data.train_files=[a,b]"],
        "recipe.onpolicy_distill.config",
        "onpolicy_distill_trainer",
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    assert "${" not in path.read_text()
    assert to_typed(OmegaConf.load(path)) == config  # type: ignore[arg-type]


def test_it_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    secrets = [f"{ENV}.HF_TOKEN", "ray_kwargs.ray_init._redis_password"]
    secrets += ["actor_rollout_ref.rollout.engine_kwargs.vllm.hf_token", "custom_reward_function.reward_kwargs.api_key"]
    config = load_config([f"{ENV}.NCCL_DEBUG=INFO", *(f"{key}=hunter2" for key in secrets)])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    given = {"password": 123456, "api_key": 7, "num_key_value_heads": 8, "max_token": 9, "a": [{"HF_TOKEN": "x"}]}
    assert redacted(given) == given | {"password": "***", "api_key": "***", "a": [{"HF_TOKEN": "***"}]}
    assert "hunter2" not in text and "NCCL_DEBUG: INFO" in text
    assert "hunter2" not in str(public_dict(config))
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"]["HF_TOKEN"] == "hunter2"


def test_configurations_of_earlier_runs_are_kept_beside_it(tmp_path: Path) -> None:
    config, path = PPOConfig(), tmp_path / "config.yaml"
    for rate in (1e-6, 2e-6, 2e-6, 3e-6):
        config.actor_rollout_ref.actor.optim.lr = rate
        save_config(config, path)
    rates = {file.name: OmegaConf.load(file).actor_rollout_ref.actor.optim.lr for file in tmp_path.iterdir()}
    assert rates == {"config.1.yaml": 1e-6, "config.2.yaml": 2e-6, "config.yaml": 3e-6}

"""The entry point's command line, as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

MODULE = "recipe.onpolicy_distill.main_onpolicy_distill"


def launch(folder: Path, *arguments: str, module: str = MODULE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_help_shows_every_key_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = launch(tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    assert "extend_vocab_start_token: null" in result.stdout
    assert "adv_estimator: on_policy_distill" in result.stdout
    assert os.listdir(tmp_path) == []


def test_cfg_takes_overrides_as_verl_writes_them(tmp_path: Path) -> None:
    result = launch(tmp_path, "--cfg", "job", "+actor_rollout_ref.ref.model.path=T", "data.image_key=x", "--resolve")
    assert result.returncode == 0, result.stderr
    assert "path: T" in result.stdout
    assert result.stderr.count("data.image_key is accepted and has no effect here") == 1
    assert os.listdir(tmp_path) == []


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    text = "defaults: [ppo_trainer, _self_]\ndata: {seed: 77}\nhydra: {searchpath: ['pkg://verl.trainer.config']}\n"
    (tmp_path / "mine.yaml").write_text(text)
    result = launch(tmp_path, "--config-dir", str(tmp_path), "-cn", "mine", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "seed: 77" in result.stdout
    assert "adv_estimator: grpo" in result.stdout


def test_user_errors_end_the_run_in_the_first_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "data.max_promt_length=5")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: data.max_promt_length is no known key"), result.stderr
    result = launch(tmp_path, "--cfg", "job", "data.seed=1,2", "-m")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: Only one of --run, --multirun, --cfg"), result.stderr


def test_settings_may_name_those_of_hydra(tmp_path: Path) -> None:
    result = launch(tmp_path, "--multirun", "actor_rollout_ref.model.path=no_${hydra:job.num}", "data.seed=1,2")
    assert result.stderr.startswith("error: actor_rollout_ref.model.path=no_0: there is no such folder"), result.stderr


def test_the_entry_point_for_task_rewards(tmp_path: Path) -> None:
    flags = ["--config-path=config", "--config-name=ppo_trainer"]
    result = launch(tmp_path, *flags, "trainer.device=cpu", module="verl.trainer.main_ppo")
    assert result.returncode == 1
    first, second, _ = result.stderr.splitlines()
    assert first.startswith("error: actor_rollout_ref.model.path is not set") and "grpo learns from a task" in second
    assert os.listdir(tmp_path) == []


def test_a_module_of_the_users_own_is_imported_before_the_settings_are_checked(tmp_path: Path) -> None:
    text = "from verl.trainer.ppo.core_algos import register_adv_est\n"
    (tmp_path / "mine.py").write_text(f"{text}\n@register_adv_est('halved')\ndef halved(**given): ...\n")
    (tmp_path / "reward.py").write_text("import no_such_package\n")
    settings = ["actor_rollout_ref.model.external_lib=mine.py", "algorithm.adv_estimator=halved"]
    result = launch(tmp_path, *settings, "custom_reward_function.path=reward.py", module="verl.trainer.main_ppo")
    assert result.stderr.count("is not set") == result.stderr.count("\n") == 2, result.stderr

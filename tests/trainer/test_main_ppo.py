"""What a run puts together before it starts, with code of the user's own."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.in_process_run import run_in_process, settings
from support.launch import read_metrics, write_onerec_parquet
from support.tiny_pairs import Pair

from verl.config import PPOConfig
from verl.trainer import main_ppo
from verl.trainer.checkpoint.layout import NothingToTrain
from verl.trainer.main_ppo import build_trainer

pytestmark = pytest.mark.usefixtures("one_rank")

MINE = """
from dataclasses import dataclass
from verl.experimental.agent_loop.tool_agent_loop import SingleTurnAgentLoop

@dataclass
class Noting(SingleTurnAgentLoop):
    file: str = ""
    async def run(self, sampling_params, **row):
        with open(self.file, "a") as notes:
            notes.write("x")
        return await super().run(sampling_params, **row)
"""


def reward_run(pair: Pair, folder: Path, **changes: Any) -> PPOConfig:
    """A step of two prompts with two answers each."""
    (folder / "reward.py").write_text("def compute_score(solution_str, **_):\n    return len(solution_str) % 3\n")
    small = {"data.train_batch_size": 2, "trainer.total_training_steps": 1, "actor_rollout_ref.rollout.n": 2}
    reward = {"algorithm.adv_estimator": "grpo", "custom_reward_function.path": folder / "reward.py"}
    return settings(pair, folder / "train.parquet", folder / "run", **small, **{**reward, **changes})


def test_an_agent_loop_that_a_file_names(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_loops.py").write_text(MINE)
    write_onerec_parquet(tmp_path / "train.parquet", 8)
    notes, agent = tmp_path / "notes", "actor_rollout_ref.rollout.agent"
    (tmp_path / "loops.yaml").write_text(f"- {{name: noting, _target_: own_loops.Noting, file: {notes}}}\n")
    named = {f"{agent}.agent_loop_config_path": tmp_path / "loops.yaml", f"{agent}.default_agent_loop": "noting"}
    run_in_process(reward_run(tiny_pair, tmp_path, **named))
    assert notes.read_text() == "xxxx"
    metrics = read_metrics(tmp_path / "run")[1]
    assert 0 <= metrics["critic/score/mean"] <= 2 and not [name for name in metrics if name.startswith("distill/")]


def test_answers_of_several_turns_are_not_carried_on(tiny_pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    loop = "verl.experimental.agent_loop.tool_agent_loop.ToolAgentLoop"
    monkeypatch.setattr(f"{loop}.writes_one_turn", False)
    (tmp_path / "loops.yaml").write_text(f"- {{name: mine, _target_: {loop}}}\n")
    table = pq.read_table(write_onerec_parquet(tmp_path / "train.parquet", 8))
    mine, single = (tmp_path / f"{name}.parquet" for name in ("mine", "single_turn_agent"))
    for file in (mine, single):
        pq.write_table(table.append_column("agent_name", [[file.stem] * 8]), file)
    key = "actor_rollout_ref.rollout"
    over = {f"{key}.oversample": 2.0, f"{key}.agent.agent_loop_config_path": tmp_path / "loops.yaml"}
    for name, files in (("mine", {"data.train_files": mine}), ("tool_agent", {})):
        with pytest.raises(ValueError, match=f"the agent loop '{name}' does not say that it writes such"):
            build_trainer(reward_run(tiny_pair, tmp_path, **over, **files))
    build_trainer(reward_run(tiny_pair, tmp_path, **over, **{"data.train_files": single, "data.val_files": mine}))


def test_what_is_found_before_anything_starts(tiny_pair: Pair, tmp_path: Path) -> None:
    table = pq.read_table(write_onerec_parquet(tmp_path / "train.parquet", 8))
    pq.write_table(table.append_column("agent_name", [[None] * 7 + ["browser"]]), tmp_path / "train.parquet")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    for key, value, expected in (
        ("algorithm.adv_estimator", "on_policy_distill", "is for distillation; run python -m recipe.onpolicy_distill"),
        (
            "actor_rollout_ref.rollout.agent.default_agent_loop",
            "own",
            r"agent loop 'own' \(a row's agent_name, or actor_r",
        ),
        (
            "actor_rollout_ref.rollout.agent.agent_loop_config_path",
            "no.yaml",
            "agent_loop_config_path=no.yaml: .*No such",
        ),
        ("custom_reward_function.path", tmp_path / "broken.py", "broken.py cannot be imported: ModuleNotFoundError"),
        ("data.seed", 2, r"agent loop 'browser' \(a row's agent_name, .* use one of .*tool_agent"),
    ):
        with pytest.raises(ValueError, match=expected):
            build_trainer(reward_run(tiny_pair, tmp_path, **{key: value}))


def test_a_run_that_has_ended_already_is_no_error(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(config: PPOConfig) -> Any:
        raise NothingToTrain("nothing to train: the run ends at step 3")

    monkeypatch.setattr(main_ppo, "to_typed", lambda config: config)
    monkeypatch.setattr(main_ppo, "keep_to_loopback", lambda: None)  # it changes this process
    write_onerec_parquet(tmp_path / "train.parquet", 4)
    main_ppo.start(reward_run(tiny_pair, tmp_path), build)
    assert capsys.readouterr().out == "nothing to train: the run ends at step 3\n"


def test_a_run_that_only_checks_starts_nothing(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main_ppo, "to_typed", lambda config: config)
    monkeypatch.setattr(main_ppo, "keep_to_loopback", lambda: None)  # it changes this process
    monkeypatch.setattr("verl.trainer.launch.run.run", lambda trainer: pytest.fail("it runs"))
    write_onerec_parquet(tmp_path / "train.parquet", 8)
    main_ppo.start(reward_run(tiny_pair, tmp_path, **{"trainer.check_only": True}), build_trainer)
    assert capsys.readouterr().out == "checked: 8 prompts; nothing was started\n"
    wrong = {"trainer.check_only": True, "data.source_weights": "{nowhere: 1.0}"}
    with pytest.raises(SystemExit, match=r"^error: data\.source_weights=.*matches no source"):
        main_ppo.start(reward_run(tiny_pair, tmp_path, **wrong), build_trainer)


def test_a_model_too_large_for_the_card_is_refused_before_ray(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.utils.device.get_device_name", lambda *_, **__: "cuda")
    monkeypatch.setattr("verl.single_controller.ray.resource_pool.check_capacity", lambda *_: None)
    monkeypatch.setattr("verl.trainer.launch.plan.card_bytes", lambda: 2**20)
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.model\.path=.* does not fit: .* set actor_rollout_ref\."):
        build_trainer(reward_run(tiny_pair, tmp_path))

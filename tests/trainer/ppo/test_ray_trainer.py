"""The loop on fakes: what each stage gets and gives, in which order, and what is logged, saved and resumed."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.file_faults import Killed
from support.launch import MEASURED, metrics_by_step
from support.loop_fakes import Prompts, R, make_config, make_trainer

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
from verl.protocol import DataProto
from verl.trainer.checkpoint.layout import NothingToTrain
from verl.trainer.ppo import ray_trainer as module
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.tracking import Tracking


def test_one_step_runs_its_stages_in_order_and_logs_every_family_once(tmp_path: Path) -> None:
    trainer, log = make_trainer(make_config(tmp_path, total_training_steps=1))
    trainer.fit()
    assert log[:3] == ["sleep", "ref_log_prob", "sync"], "the teachers are checked while the engine's memory is free"
    assert log[3:] == ["generate", "sleep", "ref_log_prob", "update", "sync"]
    # Shared token: -(-1 - -3) = -2. Extended token: -(-2 - -100) = -98, clipped to -30. Padding: 0.
    expected = torch.tensor([[-2.0, -30.0, 0.0]]).expand(4, R)
    torch.testing.assert_close(trainer.actor_wg.updated[0].batch["advantages"], expected)
    [(step, data)] = trainer.logger.lines
    gap = 2.0 - math.log(0.9)  # of what the student gives to ids that both know; item tokens have the other tenth
    by_hand = {"actor/pg_loss": 1.0, "agent_loop/turns": 2.0, "distill/reverse_kl": gap, "distill/a/reverse_kl": gap}
    by_hand |= {"distill/extend_seq_ratio": 1.0, "distill/first_leak_position": 1.0}
    by_hand["perf/throughput"] = data["perf/total_num_tokens"] / data["perf/time_per_step"] / 1  # rank of the student
    assert step == 1 and {name: data[name] for name in by_hand} == pytest.approx(by_hand)
    assert {"timing_s/gen", "timing_s/update_weights", "timing_s/step", "perf/throughput"} <= set(data)


def test_epochs_follow_until_the_last_step_and_the_data_are_notified(tmp_path: Path) -> None:
    config = make_config(tmp_path, total_training_steps=5)
    config.actor_rollout_ref.rollout.n = 2
    trainer, log = make_trainer(config)
    trainer.fit()
    assert [step for step, _ in trainer.logger.lines] == [1, 2, 3, 4, 5]
    assert trainer.train_dataset.epochs == [0, 1, 2]  # two batches of four an epoch
    assert log.count("update") == 5
    first_epoch = trainer.actor_wg.updated[:2]
    rows = [index for batch in first_epoch for index in batch.non_tensor_batch["index"]]
    assert sorted(rows) == sorted([*range(8)] * 2), "an epoch shows every prompt once, with two responses"
    uids = sorted(uid for batch in first_epoch for uid in batch.non_tensor_batch["uid"])
    assert uids[::2] == uids[1::2] and len(set(uids)) == 8, "only responses to one prompt share a uid"


def test_engines_that_slept_through_validation_are_synced_before_they_generate(tmp_path: Path) -> None:
    config = make_config(tmp_path, total_training_steps=1, test_freq=1)
    trainer, log = make_trainer(config, val_dataset=Prompts(2))
    trainer.fit()
    validation = log[log.index("sync", log.index("update")) + 1 :]
    assert validation == ["generate", "sleep", "old_log_prob", "ref_log_prob"]
    draws = [(meta["validate"], meta["global_steps"]) for meta in trainer.agent_loop_manager.meta]
    assert draws == [(False, 1), (True, 0)], "every validation draws alike"
    log.clear()
    trainer.generate(trainer.prepare(next(iter(trainer.val_loader)), n=1, validate=True))
    assert log == ["sync", "generate", "sleep"]


@pytest.mark.parametrize(
    ("name", "value"), [("n", 1), ("do_sample", False), ("top_p", 0.95), ("top_k", 20), ("temperature", 0.6)]
)
def test_validation_measures_held_out_reverse_kl_per_source_where_it_samples_the_policy(
    tmp_path: Path, name: str, value: Any
) -> None:
    config, do_sample = make_config(tmp_path), name == "n"
    setattr(config.actor_rollout_ref.rollout.val_kwargs, name, value)
    trainer, log = make_trainer(config, val_dataset=Prompts(2))
    metrics = trainer.validate()
    gap = pytest.approx(2.0 - math.log(0.9))  # the student gives a tenth to item tokens
    expected = {f"val/{source}reverse_kl": gap for source in ("", "a/", "b/")} if do_sample else {}
    assert {name: value for name, value in metrics.items() if name.endswith("reverse_kl")} == expected
    assert ("ref_log_prob" in log) == do_sample


@pytest.mark.parametrize(
    ("estimator", "teacher", "kl_term", "lacks"),
    [
        ("grpo", None, None, False),
        ("grpo", None, "loss", False),  # the reference is the student's own start
        ("grpo", None, "reward", False),
        ("grpo", "base", None, False),  # nobody asks the teacher
        ("grpo", "base", "loss", True),
        ("grpo", "base", "reward", True),
        ("on_policy_distill", "base", None, True),
    ],
)
def test_what_follows_an_item_is_masked_where_a_model_that_lacks_items_scores_it(
    tmp_path: Path, estimator: str, teacher: str | None, kl_term: str | None, lacks: bool
) -> None:
    config = make_config(tmp_path)
    config.algorithm.adv_estimator = estimator
    config.actor_rollout_ref.ref.model.path = teacher
    config.algorithm.use_kl_in_reward = kl_term == "reward"
    config.actor_rollout_ref.actor.use_kl_loss = kl_term == "loss"
    cls = RayOnPolicyDistillTrainer if config.algorithm.distils else RayPPOTrainer
    trainer, _ = make_trainer(config, cls, reward_fn=lambda **_: 1.0)
    prompts = trainer.prepare(next(trainer.prompts.batches()), n=2)
    known = prompts.non_tensor_batch.get("teacher_knows_extended")
    assert (known is None) if lacks else known.tolist() == [True] * 8
    assert config.scores_without_extended == lacks
    assert config.knows_extended("ref") == (teacher is None)


def test_a_run_resumes_where_it_was_saved(tmp_path: Path) -> None:
    configs = [
        make_config(tmp_path, total_training_steps=3, save_freq=1, max_actor_ckpt_to_keep=1),
        make_config(tmp_path, total_training_steps=4),
    ]
    for config in configs:
        config.algorithm.kl_ctrl.type = "adaptive"
    first, log = make_trainer(configs[0])
    first.kl_controller.value = 0.25
    first.fit()
    assert [entry for entry in log if entry.startswith("save")] == ["save 1", "save 2", "save 3"]
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_3"]

    second, log = make_trainer(configs[1])
    second.fit()
    expected = ["sleep", "ref_log_prob", "load 3", "sync", "generate"]
    assert log[:5] == expected, "loading needs the memory that an engine may hold"
    assert [step for step, _ in second.logger.lines] == [4]
    assert second.kl_controller.value == 0.25
    assert (first.logger.truncated_after, second.logger.truncated_after) == ([None], [3])
    seen = [row for batch in first.actor_wg.updated[2:] for row in batch.non_tensor_batch["index"]]
    seen += list(second.actor_wg.updated[0].non_tensor_batch["index"])
    assert sorted(seen) == list(range(8)), "the second epoch continues with the remaining prompts"
    with pytest.raises(NothingToTrain, match=r"nothing to train: .*global_step_3 is there; .*resume_mode=disable"):
        make_trainer(configs[0])


def test_a_run_that_validates_alone_trains_nothing_and_leaves_the_metrics(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path, total_training_steps=2, save_freq=1))[0].fit()
    alone = make_config(tmp_path, total_training_steps=4, val_only=True)
    trainer, log = make_trainer(alone, val_dataset=Prompts(2))
    trainer.fit()
    assert "update" not in log and trainer.logger.truncated_after == []
    assert [step for step, _ in trainer.logger.lines] == [2]


def test_epochs_and_mini_batches_give_the_length_of_run_and_schedule(tmp_path: Path) -> None:
    config = make_config(tmp_path, total_epochs=3)
    actor = config.actor_rollout_ref.actor
    actor.ppo_mini_batch_size, actor.ppo_epochs = 2, 2
    trainer, _ = make_trainer(config)
    assert (trainer.total_steps, actor.optim.total_training_steps) == (6, 24)


def test_mini_batches_hold_whole_prompts_over_all_ranks(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_gpus_per_node=2)
    config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.actor.ppo_mini_batch_size = 2, 2
    trainer, _ = make_trainer(config)
    lengths = torch.tensor([9, 2, 2, 2] * 2)
    for balanced in (True, False):
        trainer.config.trainer.balance_batch = balanced
        mask = (torch.arange(9) < lengths[:, None]).long()
        batch = trainer.balance(DataProto.from_dict({"attention_mask": mask}, {"uid": [*"aabbccdd"]}))
        uids, tokens = batch.array("uid").tolist(), batch.tensor("attention_mask").sum(1)
        # A rank has four rows, two of each mini-batch.
        assert [sorted(uids[at : at + 2] + uids[at + 4 : at + 6]) for at in (0, 2)] == [[*"aabb"], [*"ccdd"]]
        assert (tokens[:4].sum() == tokens[4:].sum()) == balanced


@pytest.mark.parametrize("async_save", [True, False])
def test_a_kill_between_a_checkpoint_and_its_line_loses_no_metrics(tmp_path: Path, async_save: bool) -> None:
    def trainer_of(folder: Path, steps: int = 4, **settings: Any) -> Any:
        settings = {"save_freq": 2, "test_freq": 2, "total_training_steps": steps, "async_save": async_save, **settings}
        made, _ = make_trainer(make_config(folder, **settings), val_dataset=Prompts(2))
        made.logger = Tracking("project", "run", ["file"], local_dir=folder)
        return made

    whole, run = tmp_path / "whole", tmp_path / "run"
    trainer_of(whole).fit()
    killed = trainer_of(run, steps=2)  # the last step waits for its checkpoint
    log = killed.logger.log

    def log_or_die(data: dict[str, float], step: int) -> None:
        if step == 2:
            raise Killed
        log(data, step)

    killed.logger.log = log_or_die
    with pytest.raises(Killed):
        killed.fit()
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert [*metrics_by_step(run, 1)] == [1]
    # Its own folder by another name, from which it also takes the checkpoint.
    (tmp_path / "name").symlink_to(run)
    trainer_of(run, resume_mode="resume_path", resume_from_path=f"{tmp_path / 'name'}/global_step_2").fit()
    assert metrics_by_step(run, 4, MEASURED) == metrics_by_step(whole, 4, MEASURED)
    trainer_of(run, steps=6).fit()
    assert [*metrics_by_step(run, 6)] == [1, 2, 3, 4, 5, 6], "none is there twice"
    elsewhere = tmp_path / "elsewhere"
    trainer_of(elsewhere, resume_mode="resume_path", resume_from_path=str(run / "global_step_2")).fit()
    assert [*metrics_by_step(elsewhere, 4, first=3)] == [3, 4], "another run's metrics are not this one's"


def test_old_checkpoints_of_another_run_do_not_cost_a_new_run_its_own(tmp_path: Path) -> None:
    for step in (400, 450):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    config = make_config(tmp_path, total_training_steps=3, save_freq=1, max_actor_ckpt_to_keep=2, resume_mode="disable")
    trainer, _ = make_trainer(config)
    trainer.fit()
    left = sorted(path.name for path in tmp_path.glob("global_step_*"))
    assert left == ["global_step_2", "global_step_3", "global_step_400", "global_step_450"]


def test_data_may_be_exchanged_where_that_is_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = make_trainer(make_config(tmp_path, total_training_steps=1, save_freq=1))
    first.kl_controller.value = 0.25  # a fixed one is as the settings have it
    first.fit()
    with pytest.raises(ValueError, match="saved after 8 prompts in batches of 4, now 12 prompts"):
        make_trainer(make_config(tmp_path, total_training_steps=2), train_dataset=Prompts(12))
    config = make_config(tmp_path, total_training_steps=2, resume_allow_changed=["data.train_files"])
    second, _ = make_trainer(config, train_dataset=Prompts(12))
    second.fit()
    assert "the data start over: saved after 8 prompts" in caplog.text
    assert second.train_dataset.epochs == [0] and second.kl_controller.value == config.algorithm.kl_ctrl.kl_coef


def test_other_files_of_as_many_prompts_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    for steps, name in enumerate(("a", "b", "b"), 1):  # the last goes on in its own files, under the same command
        monkeypatch.setattr(module, "run_identity", lambda *_, name=name: {"data.train_files": name})
        allowed = {"resume_allow_changed": ["data.train_files"]}
        trainer, _ = make_trainer(make_config(tmp_path, total_training_steps=steps, save_freq=1, **allowed))
        trainer.fit()
        assert trainer.prompts.state_dict()["batches"] == (1, 1, 2)[steps - 1]
    assert caplog.text.count("in batches of 4, now 8 prompts in batches of 4 of other files") == 1


@pytest.mark.parametrize("cls", [RayOnPolicyDistillTrainer, RayPPOTrainer])
def test_every_estimator_corrects_for_the_sampler_where_asked(tmp_path: Path, cls: type[RayPPOTrainer]) -> None:
    config = make_config(tmp_path, total_training_steps=1)
    config.algorithm.rollout_correction.rollout_is = "token"
    config.algorithm.adv_estimator = "grpo" if cls is RayPPOTrainer else "on_policy_distill"
    trainer, _ = make_trainer(config, cls, reward_fn=lambda **_: 1.0)
    trainer.fit()
    # The sampler's log-prob of both tokens was -1.5; the policy's are -1 and -2.
    expected = torch.tensor([[0.5, -0.5, 0.0]]).exp() * torch.tensor([1.0, 1.0, 0.0])
    weights = trainer.actor_wg.updated[0].batch["rollout_is_weights"]
    torch.testing.assert_close(weights, expected.expand(4, R))


def test_every_part_is_closed_whatever_another_raises(tmp_path: Path) -> None:
    trainer, _ = make_trainer(make_config(tmp_path))
    engines, ranks, log = Mock(), Mock(), Mock()
    trainer.agent_loop_manager, trainer.worker_groups, trainer.logger = engines, ranks, log
    engines.shutdown.side_effect = OSError
    with pytest.raises(OSError):
        trainer.shutdown()
    ranks.shutdown.assert_called_once()
    log.finish.assert_called_once()

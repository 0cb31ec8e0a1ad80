"""Validations of several batches: the metrics of their stages as if there had been one batch; several answers each."""

import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.loop_fakes import Engines, Prompts, make_config, make_trainer

from verl.config import TeacherConfig
from verl.config.best_rule import MetricRuleError
from verl.protocol import DataProto
from verl.trainer.ppo.validation_metrics import answers_metrics, compute_validation_reward_metrics, join_metrics


def test_metrics_of_batches_are_joined_by_their_names() -> None:
    by_hand = {  # of six rows, of two, of all
        "agent_loop/tool_calls": (3.0, 4.0, 7.0),
        "agent_loop/tool_reward/min": (-1.0, 0.0, -1.0),
        "agent_loop/tool_reward/max": (2.0, 5.0, 5.0),
        "agent_loop/tool_reward/mean": (1.0, 2.0, 1.25),  # (6 x 1 + 2 x 2) / 8
        "rollout/share": (0.5, 0.25, 0.4375),  # (6 x 0.5 + 2 x 0.25) / 8
    }
    first, second, joined = ({name: values[place] for name, values in by_hand.items()} for place in range(3))
    late = {"rollout/late": 7.0}
    assert join_metrics([(6, first), (2, second | late)]) == joined | late
    assert join_metrics([]) == {}


@pytest.mark.parametrize("pred", ["AAB", "ABCC"])
def test_answers_to_one_prompt_are_drawn_again_and_vote(pred: str) -> None:
    values = [float(place) for place in range(len(pred))]
    best, voted = [], []
    for draw in product(range(len(pred)), repeat=len(pred)):  # all there are; the metrics come from 1,000 of them
        [(winner, _)] = Counter(pred[place] for place in draw).most_common(1)  # of equals the first, as verl has it
        best.append(max(draw))
        voted.append(next(place for place in draw if pred[place] == winner))
    n, metrics = len(pred), answers_metrics(np.array(values), np.array(list(pred)))
    assert metrics == pytest.approx(
        {f"mean@{n}": np.mean(values), f"best@{n}/mean": np.mean(best), f"maj@{n}/mean": np.mean(voted)}, abs=0.1
    )


def test_metrics_of_answers_are_means_over_the_prompts_of_a_source() -> None:
    acc = [True, 1, np.bool_(True), 0.0, True, None]  # one answer of source b has none: its rewards stand in
    arrays: dict[str, Any] = {"source": list("aaaabb"), "uid": list("010122")}
    arrays["reward_extra"] = [{"pred": pred, "acc": value} for pred, value in zip("xxxyzz", acc, strict=True)]
    batch = DataProto.from_dict({"token_level_scores": torch.tensor([[5.0]] * 4 + [[2.0]] * 2)}, arrays)
    # Of prompt 1 one answer of two is right: three draws of four hold it, and its vote wins where it comes first.
    core = {"a/acc/mean@2": 0.75, "a/acc/best@2/mean": 0.875, "a/acc/maj@2/mean": 0.75}
    core |= dict.fromkeys(("b/reward/mean@2", "b/reward/best@2/mean", "b/reward/maj@2/mean"), 2.0)
    metrics = compute_validation_reward_metrics(batch)
    found = {name: value for name, value in metrics.items() if name.startswith("val-core/")}
    assert found == pytest.approx({f"val-core/{name}": value for name, value in core.items()}, abs=0.02)


class CountingEngines(Engines):
    """Every response calls two tools and takes a second; every batch finds weights that were just sent."""

    version = 0

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        generated = super().generate_sequences(prompts)
        calls = {"agent_loop/tool_calls": 2.0 * len(prompts), "timing_s/agent_loop/tool_calls/max": 1.0}
        self.version += 1
        generated.meta_info |= {"metrics": calls, "weight_version": self.version}
        return generated


def reward(data_source: str, ground_truth: str, **_: Any) -> dict[str, float]:
    """Reports the row's number beside its score, and of odd ones their half."""
    number = float(ground_truth)
    return {"score": 1.0, "number": number} | ({"half": number / 2} if number % 2 else {})


def trainer_of(folder: Path, **settings: Any) -> Any:
    config = make_config(folder, **settings)
    config.data.val_batch_size = 2  # five rows: the last batch has one
    trainer, log = make_trainer(config, val_dataset=Prompts(5), reward_fn=reward)
    trainer.agent_loop_manager = CountingEngines(log)
    return trainer


def test_a_validation_logs_the_metrics_of_its_stages(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.stage_metrics = {"rollout/of_a_step": 1.0}
    metrics = trainer.validate()
    assert metrics["val_reward_extra/number"] == pytest.approx((0 + 1 + 2 + 3 + 4) / 5)
    assert metrics["val_reward_extra/half"] == pytest.approx((0.5 + 1.5) / 2), "of the rows that have it"
    assert metrics["val_agent_loop/tool_calls"] == 10.0
    # 2 nats a token over all ids, of which the student gives a tenth to item tokens.
    assert metrics["val/reward"] == 1.0 and metrics["val/reverse_kl"] == pytest.approx(2.0 - math.log(0.9))
    assert not {name for name in metrics if "of_a_step" in name or "timing_s/agent_loop" in name}


class PaddedEngines(Engines):
    """Prompts are padded on the left with an extended id; every second one holds one too."""

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        generated = super().generate_sequences(prompts)
        generated.batch["prompts"][:, 0], generated.batch["attention_mask"][:, 0] = 9, 0
        generated.batch["prompts"][1::2, 1] = 8
        return generated


def test_padding_with_an_extended_id_is_no_item_in_a_prompt(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.agent_loop_manager = PaddedEngines([])
    trainer.config.actor_rollout_ref.rollout.extend_vocab_start_token = 8
    assert "val/a/reverse_kl" in (metrics := trainer.validate()) and "val/b/reverse_kl" not in metrics


def test_without_an_extension_rows_of_all_teachers_count(tmp_path: Path) -> None:
    """A further teacher knows all ids of the student, as they all do."""
    trainer = trainer_of(tmp_path)
    trainer.config.algorithm.distill.teachers = {"helper": TeacherConfig(sources=["b"])}
    batch = trainer.prepare({"source": np.array(list("ab")), "index": np.arange(2)}, n=1)
    assert len(trainer.rows_of_lacking_teachers(batch)) == 2
    trainer.config.actor_rollout_ref.rollout.extend_vocab_start_token = 8
    assert trainer.rows_of_lacking_teachers(batch).array("source").tolist() == ["a"]


def test_as_many_answers_as_asked_for_go_to_the_loggers(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, log_val_generations=3)
    trainer.global_steps = 7
    trainer.validate()
    assert trainer.logger.answers == [(7, f"val-{index}") for index in range(3)]


def test_the_best_checkpoint_may_be_chosen_by_them(tmp_path: Path) -> None:
    rule = "val_reward_extra/number subject to val_agent_loop/tool_calls <= 10"
    settings = {"test_freq": 1, "save_freq": 5, "total_training_steps": 1}
    trainer = trainer_of(tmp_path / "run", best_metric=rule, **settings)
    trainer.fit()
    [(_, metrics)] = trainer.logger.lines
    assert (metrics["training/best_step"], metrics["training/best_value"]) == (1, 2.0)
    wrong = trainer_of(tmp_path / "other", best_metric="val_reward_extra/nothing", **settings)
    with pytest.raises(MetricRuleError, match=r"it gives .*val_agent_loop/tool_calls.*val_reward_extra/number"):
        wrong.fit()

"""Metrics of a small batch, each worked out by hand."""

import math

import numpy as np
import pytest
import torch

from verl.config import AlgoConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.trainer.ppo.metric_utils import (
    compute_advantage_part_metrics,
    compute_data_metrics,
    compute_on_policy_distill_data_metrics,
    compute_throughout_metrics,
    compute_timing_metrics,
    compute_validation_distill_metrics,
    compute_validation_reward_metrics,
    reduce_metrics,
)

NAN = float("nan")


def batch_of_three() -> DataProto:
    """Prompts of 2, 1, 2 tokens (room for 2), responses of 4, 3, 2 tokens (room for 4).

    ::

        row  source  response  response_mask  extended  what happened
         0   math    a b c d   1 1 1 1        0 0 0 0   nothing special
         1   item    a E b -   1 1 0 -        0 1 0 -   leaks at its second token: trained up to and including it
         2   item    E a - -   0 0 - -        1 0 - -   leaks at once and is dropped as a whole

    NaN stands where no metric may look.
    """
    student = [[-1.0, -2.0, -1.0, -4.0], [-1.0, -0.5, NAN, NAN], [NAN, NAN, NAN, NAN]]
    teacher = [[-2.0, -2.0, -1.5, -1.0], [-3.0, -100.0, NAN, NAN], [NAN, NAN, NAN, NAN]]
    return DataProto.from_dict(
        {
            "responses": torch.ones(3, 4, dtype=torch.int64),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]),
            "response_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
            "distill_special_token_mask": torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]),
            "old_log_probs": torch.tensor(student),
            "ref_log_prob": torch.tensor(teacher),
            "extend_mass": torch.tensor([[0.1, 0.2, 0.1, 0.2], [0.3, 0.9, NAN, NAN], [NAN] * 4]),
            "entropys": torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, NAN, NAN], [NAN] * 4]),
            "advantages": torch.tensor([[-1.0, 0.0, -0.5, 2.0], [-2.0, -30.0, 0.0, 0.0], [0.0] * 4]),
            "returns": torch.tensor([[-1.0, 0.0, -0.5, 2.0], [-2.0, -30.0, 0.0, 0.0], [0.0] * 4]),
        },
        {
            "data_source": np.array(["math", "item", "item"], dtype=object),
            "__num_turns__": np.array([2, 2, 4], dtype=object),
        },
    )


CLIPS = AlgoConfig(distill_adv_min_clip=-30.0, distill_adv_max_clip=2.5)


def test_distillation_figures_overall() -> None:
    metrics = compute_on_policy_distill_data_metrics(batch_of_three(), CLIPS)
    overall = {key: value for key, value in metrics.items() if key.count("/") == 1}
    assert overall == {
        # student - teacher at shared trained tokens: 1, 0, 0.5, -3 (row 0), 2 (row 1, before E): 0.5 / 5
        "distill/reverse_kl": pytest.approx(0.1),
        "distill/extend_adv_share": pytest.approx(30 / 36),  # see below
        "distill/extend_seq_ratio": pytest.approx(2 / 3),
        "distill/extend_token_ratio": pytest.approx(2 / 9),  # of 4 + 3 + 2 response tokens
        "distill/first_leak_position": pytest.approx(0.5),  # 1 and 0
        "distill/extend_mass": pytest.approx(0.3),  # (0.1 + 0.2 + 0.1 + 0.2 + 0.3 + 0.9) / 6 trained tokens
        "distill/adv_clipfrac_low": pytest.approx(1 / 6),  # -99.5 < -30
        "distill/adv_clipfrac_high": pytest.approx(1 / 6),  # 3 > 2.5
        "distill/num_sequences": 3.0,
        "distill/trained_tokens": 6.0,
        "distill/trained_token_ratio": pytest.approx(6 / 9),
        "distill/masked_seq_ratio": pytest.approx(1 / 3),
        "distill/entropy": pytest.approx(2.0),  # 12 / 6
    }


@pytest.mark.parametrize("objective", ["exact", "forward_kl", "topk"])
def test_where_no_advantage_is_followed_none_is_described(objective: str) -> None:
    config = AlgoConfig(distill_adv_min_clip=-30.0, distill=DistillConfig(objective))
    metrics, all_of_them = (
        compute_on_policy_distill_data_metrics(batch_of_three(), given) for given in (config, CLIPS)
    )
    names = ("extend_adv_share", "adv_clipfrac_low", "adv_clipfrac_high")
    assert metrics == {name: value for name, value in all_of_them.items() if not name.endswith(names)}
    assert len(metrics) == len(all_of_them) - 9, "overall and of two sources"


def test_distillation_figures_per_source() -> None:
    metrics = compute_on_policy_distill_data_metrics(batch_of_three(), CLIPS)
    assert metrics["distill/math/reverse_kl"] == pytest.approx(-0.375)  # -1.5 / 4
    assert metrics["distill/item/reverse_kl"] == pytest.approx(2.0)
    assert metrics["distill/math/extend_seq_ratio"] == 0.0
    assert metrics["distill/item/extend_seq_ratio"] == 1.0
    assert metrics["distill/math/extend_mass"] == pytest.approx(0.15)
    assert metrics["distill/item/extend_mass"] == pytest.approx(0.6)
    assert metrics["distill/math/adv_clipfrac_low"] == 0.0
    assert metrics["distill/item/adv_clipfrac_low"] == pytest.approx(0.5)
    assert metrics["distill/item/first_leak_position"] == pytest.approx(0.5)
    assert metrics["distill/math/num_sequences"] == 1.0
    assert metrics["distill/item/masked_seq_ratio"] == pytest.approx(0.5)
    assert "distill/math/first_leak_position" not in metrics, "nothing leaked there: no position to report"
    # Every metric stands per source too, but for the one just named.
    names = {key.removeprefix("distill/") for key in metrics if key.count("/") == 1}
    for source, missing in (("math", {"first_leak_position"}), ("item", set())):
        assert {key.split("/")[2] for key in metrics if key.startswith(f"distill/{source}/")} == names - missing


@pytest.mark.parametrize(
    ("low", "high", "expected_low", "expected_high"),
    [
        (None, None, 0.0, 0.0),
        (0.0, None, 4 / 6, 0.0),  # -1, -0.5, -2, -99.5 lie below 0
        (None, 0.0, 0.0, 1 / 6),  # 3 lies above 0
    ],
)
def test_a_bound_of_zero_is_counted_and_none_is_not(
    low: float | None, high: float | None, expected_low: float, expected_high: float
) -> None:
    config = AlgoConfig(distill_adv_min_clip=low, distill_adv_max_clip=high)
    metrics = compute_on_policy_distill_data_metrics(batch_of_three(), config)
    assert metrics["distill/adv_clipfrac_low"] == pytest.approx(expected_low)
    assert metrics["distill/adv_clipfrac_high"] == pytest.approx(expected_high)


def test_figures_over_nothing_are_left_out() -> None:
    batch = batch_of_three()
    batch.batch["response_mask"] = torch.zeros_like(batch.batch["response_mask"])
    distill = compute_on_policy_distill_data_metrics(batch, CLIPS)
    for key in ("reverse_kl", "extend_mass", "adv_clipfrac_low", "entropy"):
        assert f"distill/{key}" not in distill
    assert distill["distill/trained_tokens"] == 0.0
    assert distill["distill/masked_seq_ratio"] == 1.0
    data = compute_data_metrics(batch)
    assert "critic/advantages/mean" not in data
    assert all(math.isfinite(value) for value in (distill | data).values())


def test_rows_without_a_source_have_overall_figures_alone() -> None:
    batch = batch_of_three()
    batch.pop(non_tensor_batch_keys=["data_source"])
    metrics = compute_on_policy_distill_data_metrics(batch, CLIPS)
    assert all(key.count("/") == 1 for key in metrics)


def test_data_metrics_under_verls_names() -> None:
    metrics = compute_data_metrics(batch_of_three())
    expected = {
        "critic/advantages/mean": -31.5 / 6,
        "critic/advantages/max": 2.0,
        "critic/advantages/min": -30.0,
        "critic/returns/mean": -31.5 / 6,
        "actor/entropy": 2.0,
        "response_length/mean": 3.0,
        "response_length/max": 4.0,
        "response_length/min": 2.0,
        "response_length/clip_ratio": 1 / 3,
        "prompt_length/mean": 5 / 3,
        "prompt_length/clip_ratio": 2 / 3,
        "num_turns/mean": 8 / 3,
        "num_turns/max": 4.0,
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value), key
    assert not [key for key in metrics if key.startswith(("critic/score", "critic/rewards", "training/"))]
    assert all(isinstance(value, float) for value in metrics.values())


def test_scores_are_summed_over_a_row() -> None:
    batch = batch_of_three()
    batch.batch["token_level_scores"] = torch.tensor([[0.0, 0, 0, 1], [0, 0, 3, 0], [0, 2, 0, 0]])
    metrics = compute_data_metrics(batch)
    assert [metrics[f"critic/score/{name}"] for name in ("mean", "max", "min")] == [2.0, 3.0, 1.0]


def test_distance_between_sampler_and_policy() -> None:
    batch = batch_of_three()
    rollout = batch.batch["old_log_probs"].clone()
    rollout[0, 0] = math.log(0.5)  # the policy's is e^-1 = 0.36788
    batch.batch["rollout_log_probs"] = rollout
    metrics = compute_data_metrics(batch)
    assert metrics["training/rollout_probs_diff_max"] == pytest.approx(0.5 - math.exp(-1))
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx((0.5 - math.exp(-1)) / 6)
    assert metrics["training/rollout_log_probs_diff_max"] == pytest.approx(1 - math.log(2))
    assert metrics["rollout_corr/kl"] == pytest.approx((1 - math.log(2)) / 6)

    batch.batch["rollout_is_weights"] = torch.tensor([[2.0, 1, 1, 1], [1, 0, NAN, NAN], [NAN] * 4])
    metrics = compute_data_metrics(batch)
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0)
    assert metrics["rollout_corr/rollout_is_max"] == 2.0
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(36 / (6 * 8))


def test_timing_per_token() -> None:
    # 5 prompt and 9 response tokens.
    metrics = compute_timing_metrics(batch_of_three(), {"gen": 0.9, "update_actor": 1.4, "step": 3.0})
    assert metrics == {
        "timing_s/gen": 0.9,
        "timing_s/update_actor": 1.4,
        "timing_s/step": 3.0,
        "timing_per_token_ms/gen": pytest.approx(100.0),
        "timing_per_token_ms/update_actor": pytest.approx(100.0),
    }


def test_throughput_is_per_rank() -> None:
    metrics = compute_throughout_metrics(batch_of_three(), {"gen": 0.9, "step": 3.5}, n_gpus=2)
    assert metrics == {
        "perf/total_num_tokens": 14.0,
        "perf/time_per_step": 3.5,
        "perf/throughput": pytest.approx(2.0),
        "perf/generated_tokens_per_s": pytest.approx(10.0),
    }


def test_validation_figures() -> None:
    metrics = compute_validation_distill_metrics(batch_of_three())
    assert metrics["val/reverse_kl"] == pytest.approx(0.1)
    assert metrics["val/math/reverse_kl"] == pytest.approx(-0.375)
    assert metrics["val/item/reverse_kl"] == pytest.approx(2.0)
    assert metrics["val/item/extend_seq_ratio"] == 1.0
    assert metrics["val/response_length"] == 3.0


def test_validation_rewards() -> None:
    batch = batch_of_three()
    batch.batch["token_level_scores"] = torch.tensor([[0.0, 0, 0, 1], [0, 0, 3, 0], [0, 2, 0, 0]])
    assert compute_validation_reward_metrics(batch) == {
        "val/reward": 2.0,
        "val/item/reward": 2.5,
        "val/math/reward": 1.0,
    }


def test_reduction_follows_the_name() -> None:
    metrics = {"actor/pg_loss": [1.0, 3.0], "perf/max_memory": [1, 5], "perf/min_free": [1, 5], "maximum/mean": [1, 3]}
    assert reduce_metrics(metrics) == {
        "actor/pg_loss": 2.0,
        "perf/max_memory": 5.0,
        "perf/min_free": 1.0,
        "maximum/mean": 2.0,
    }


def test_what_a_reward_function_reports_beside_the_score_is_averaged() -> None:
    batch = batch_of_three()
    batch.non_tensor_batch["reward_extra"] = np.array(
        [{"format_ok": True, "note": "a"}, {"format_ok": False, "rare": 0.5}, {"format_ok": True}], dtype=object
    )
    expected = {"format_ok": pytest.approx(2 / 3), "rare": 0.5}
    metrics = compute_data_metrics(batch)
    assert {name: metrics[name] for name in metrics if name.startswith("reward_extra/")} == {
        f"reward_extra/{key}": value for key, value in expected.items()
    }
    batch.batch["token_level_scores"] = torch.zeros_like(batch.tensor("response_mask"), dtype=torch.float32)
    measured = compute_validation_reward_metrics(batch)
    assert {name: measured[name] for name in measured if name.startswith("val_reward_extra/")} == {
        f"val_reward_extra/{key}": value for key, value in expected.items()
    }


def batch_of_two_teachers() -> DataProto:
    """The same three rows; the second teacher knows item tokens and judges row 1, which is trained to its end."""
    batch = batch_of_three()
    batch.batch["ref_log_prob"][1] = torch.tensor([-3.0, -2.5, -1.0, NAN])
    batch.batch["old_log_probs"][1, 2] = -3.0
    batch.batch["extend_mass"][1, 2] = batch.batch["entropys"][1, 2] = 0.5
    batch.batch["response_mask"][1] = torch.tensor([1, 1, 1, 0])
    batch.batch["advantages"][1] = torch.tensor([-2.0, -2.0, 2.0, 0.0])
    batch.batch["teacher"] = torch.tensor([0, 1, 0])
    batch.non_tensor_batch["teacher_knows_extended"] = np.array([False, True, False], dtype=object)
    return batch


def test_the_share_of_item_tokens_in_the_advantage() -> None:
    metrics = compute_on_policy_distill_data_metrics(batch_of_three(), CLIPS)
    # |A| after clipping: 1, 0, 0.5, 2.5 (3 held) in row 0; 2 and, at the item token, 30 (99.5 held) in row 1.
    assert metrics["distill/extend_adv_share"] == pytest.approx(30 / 36)
    assert metrics["distill/math/extend_adv_share"] == 0.0
    assert metrics["distill/item/extend_adv_share"] == pytest.approx(30 / 32)
    assert "distill/extend_reverse_kl" not in metrics, "no teacher knows the item tokens"
    unclipped = compute_on_policy_distill_data_metrics(batch_of_three())
    assert unclipped["distill/extend_adv_share"] == pytest.approx(99.5 / 106)  # 4.5 in row 0, 101.5 in row 1


def test_figures_per_teacher() -> None:
    further = {"self": TeacherConfig(sources=["item"])}
    config = AlgoConfig(adv_estimator="on_policy_distill", distill=DistillConfig(teachers=further))
    metrics = compute_on_policy_distill_data_metrics(batch_of_two_teachers(), config)
    assert metrics["distill_teacher/ref/reverse_kl"] == pytest.approx(-0.375)
    assert metrics["distill_teacher/self/reverse_kl"] == pytest.approx(0.0)  # 2 and -2 at the shared tokens
    assert metrics["distill_teacher/self/extend_reverse_kl"] == pytest.approx(2.0)  # -0.5 - -2.5
    assert metrics["distill/extend_reverse_kl"] == pytest.approx(2.0)
    assert "distill_teacher/ref/extend_reverse_kl" not in metrics
    assert metrics["distill_teacher/self/extend_adv_share"] == pytest.approx(2 / 6)
    assert metrics["distill_teacher/ref/num_sequences"] == 2.0
    overall = {key.removeprefix("distill/") for key in metrics if key.startswith("distill/") and key.count("/") == 1}
    assert {key.rsplit("/", 1)[1] for key in metrics if key.startswith("distill_teacher/self/")} == overall
    alone = compute_on_policy_distill_data_metrics(batch_of_two_teachers()[[1]], config)
    for name in overall:
        assert alone[f"distill/{name}"] == metrics[f"distill_teacher/self/{name}"], name


def test_parts_of_a_summed_advantage() -> None:
    distill = DistillConfig(coef=0.5, teachers={"self": TeacherConfig(sources=["item"], weight=2.0)})
    batch = batch_of_two_teachers()
    config = AlgoConfig(distill_adv_max_clip=2.0, distill=distill)
    # Distillation: 0.5 x (-1, 0, -0.5, 2 held) in row 0 and 0.5 x 2 x (-2, -2, 2) in row 1. The task's: 1 and -1.
    part = torch.tensor([[-0.5, 0.0, -0.25, 1.0], [-2.0, -2.0, 2.0, 0.0], [0.0] * 4])
    batch.batch["advantages"] = part + torch.tensor([[1.0] * 4, [-1.0, -1.0, -1.0, 0.0], [0.0] * 4])
    metrics = compute_advantage_part_metrics(batch, config)
    assert metrics["advantage/task_abs"] == pytest.approx(1.0)
    assert metrics["advantage/distill_abs"] == pytest.approx(7.75 / 7)
    assert metrics["advantage/distill_share"] == pytest.approx(7.75 / 14.75)
    assert metrics["advantage/math/distill_share"] == pytest.approx(1.75 / 5.75)
    assert metrics["advantage_teacher/self/distill_share"] == pytest.approx(6 / 9)
    assert metrics["advantage_teacher/ref/distill_abs"] == pytest.approx(1.75 / 4)

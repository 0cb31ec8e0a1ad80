"""Metrics of a small batch, each worked out by hand."""

import math

import numpy as np
import pytest
import torch

from verl.config import AlgoConfig, DistillConfig, TeacherConfig
from verl.protocol import DataProto
from verl.trainer.ppo import metric_utils
from verl.trainer.ppo.validation_metrics import compute_validation_reward_metrics

NAN = float("nan")


def batch_of_three() -> DataProto:
    """Prompts of 2, 1, 2 tokens (at most 2), responses of 4, 3, 2 tokens (at most 4).

    ::

        row  source  response  response_mask  extended  what happened
         0   math    a b c d   1 1 1 1        0 0 0 0   nothing special
         1   item    a E b -   1 1 0 -        0 1 0 -   leaks at its second token: trained up to and including it
         2   item    E a - -   0 0 - -        1 0 - -   leaks at once and is dropped as a whole

    NaN is where no metric may read.
    """
    nan = [NAN] * 4
    tensors = {
        "responses": [[1] * 4] * 3,
        "attention_mask": [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]],
        "response_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]],
        "distill_special_token_mask": [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
        "old_log_probs": [[-1.0, -2.0, -1.0, -4.0], [-1.0, -0.5, NAN, NAN], nan],
        "ref_log_prob": [[-2.0, -2.0, -1.5, -1.0], [-3.0, -100.0, NAN, NAN], nan],
        "extend_mass": [[0.1, 0.2, 0.1, 0.2], [0.3, 0.9, NAN, NAN], nan],
        "entropys": [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, NAN, NAN], nan],
        "advantages": [[-1.0, 0.0, -0.5, 2.0], [-2.0, -30.0, 0.0, 0.0], [0.0] * 4],
        "returns": [[-1.0, 0.0, -0.5, 2.0], [-2.0, -30.0, 0.0, 0.0], [0.0] * 4],
    }
    arrays = {"data_source": ["math", "item", "item"], "__num_turns__": [2, 2, 4]}
    return DataProto.from_dict({key: torch.tensor(rows) for key, rows in tensors.items()}, arrays)


SCORES = torch.tensor([[0.0, 0, 0, 1], [0, 0, 3, 0], [0, 2, 0, 0]])
MATH, ITEM = -2 * math.log(0.9 * 0.8), -math.log(0.7)
"""Nats by which p_student grows at the shared trained tokens of a source, once it is normalised over the shared ids."""
CLIPS = AlgoConfig(distill_adv_min_clip=-30.0, distill_adv_max_clip=2.5)


def test_distillation_metrics_by_hand() -> None:
    metrics = metric_utils.compute_on_policy_distill_data_metrics(batch_of_three(), CLIPS)
    overall = {key: value for key, value in metrics.items() if key.count("/") == 1}
    assert overall == {
        # student - teacher at shared trained tokens: 1, 0, 0.5, -3 (row 0), 2 (row 1, before E): 0.5 / 5; the student's
        # shares of the shared ids there are 0.9, 0.8, 0.9, 0.8 and 0.7
        "distill/reverse_kl": pytest.approx(0.1 + (MATH + ITEM) / 5),
        # |A| after clipping: 1, 0, 0.5, 2.5 (3 clipped) in row 0; 2 and, at the item token, 30 (99.5 clipped) in row 1
        "distill/extend_adv_share": pytest.approx(30 / 36),
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
    per_source = {
        "reverse_kl": (-0.375 + MATH / 4, 2.0 + ITEM),  # -1.5 / 4
        "extend_adv_share": (0.0, 30 / 32),
        "extend_seq_ratio": (0.0, 1.0),
        "extend_mass": (0.15, 0.6),
        "adv_clipfrac_low": (0.0, 0.5),
        "masked_seq_ratio": (0.0, 0.5),
    }
    for name, values in per_source.items():
        assert [metrics[f"distill/{source}/{name}"] for source in ("math", "item")] == pytest.approx(values), name
    # Every metric is there per source too, but for the position of a leak where nothing leaked.
    names = {key.removeprefix("distill/") for key in overall}
    for source, missing in (("math", {"first_leak_position"}), ("item", set())):
        assert {key.split("/")[2] for key in metrics if key.startswith(f"distill/{source}/")} == names - missing
    without = batch_of_three()
    without.pop(non_tensor_batch_keys=["data_source"])
    assert metric_utils.compute_on_policy_distill_data_metrics(without, CLIPS).keys() == overall.keys()


@pytest.mark.parametrize("objective", ["exact", "forward_kl", "topk"])
def test_objectives_without_an_advantage_have_no_metrics_of_it(objective: str) -> None:
    config = AlgoConfig(distill_adv_min_clip=-30.0, distill=DistillConfig(objective))
    measure = metric_utils.compute_on_policy_distill_data_metrics
    metrics, every = measure(batch_of_three(), config), measure(batch_of_three(), CLIPS)
    of_advantage = ("extend_adv_share", "adv_clipfrac_low", "adv_clipfrac_high")
    assert metrics == {name: value for name, value in every.items() if not name.endswith(of_advantage)}
    assert len(metrics) == len(every) - 9, "overall and of two sources"


def test_a_bound_of_zero_is_counted() -> None:
    cases = [
        (None, None, [0.0, 0.0]),
        (0.0, None, [4 / 6, 0.0]),  # -1, -0.5, -2, -99.5 are below 0
        (None, 0.0, [0.0, 1 / 6]),  # 3 is above 0
    ]
    for low, high, shares in cases:
        config = AlgoConfig(distill_adv_min_clip=low, distill_adv_max_clip=high)
        metrics = metric_utils.compute_on_policy_distill_data_metrics(batch_of_three(), config)
        assert [metrics[f"distill/adv_clipfrac_{name}"] for name in ("low", "high")] == pytest.approx(shares)


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9])
def test_mass_on_item_tokens_makes_no_student_look_nearer(mass: float) -> None:
    """Among the ids that both know it is the teacher; one that knows item tokens is compared over all ids."""
    batch, measure = batch_of_three(), metric_utils.compute_validation_distill_metrics
    batch.batch["old_log_probs"] = batch.batch["ref_log_prob"] + math.log(1 - mass)
    batch.batch["extend_mass"] = torch.full_like(batch.batch["old_log_probs"], mass)
    assert measure(batch)["val/reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    batch.non_tensor_batch["teacher_knows_extended"] = np.array([False, True, False], dtype=object)
    found = [measure(batch)[f"val/{source}/reverse_kl"] for source in ("math", "item")]
    assert found == pytest.approx([0.0, math.log(1 - mass)], abs=1e-6)


def test_metrics_over_nothing_are_left_out() -> None:
    batch = batch_of_three()
    batch.batch["response_mask"] = torch.zeros_like(batch.batch["response_mask"])
    distill = metric_utils.compute_on_policy_distill_data_metrics(batch, CLIPS)
    data = metric_utils.compute_data_metrics(batch)
    assert not {f"distill/{key}" for key in ("reverse_kl", "extend_mass", "adv_clipfrac_low", "entropy")} & set(distill)
    assert distill["distill/trained_tokens"] == 0.0 and distill["distill/masked_seq_ratio"] == 1.0
    assert "critic/advantages/mean" not in data
    assert all(math.isfinite(value) for value in (distill | data).values())


def test_data_metrics_under_verls_names() -> None:
    batch = batch_of_three()
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
    metrics = metric_utils.compute_data_metrics(batch)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert not [key for key in metrics if key.startswith(("critic/score", "critic/rewards", "training/"))]
    assert all(isinstance(value, float) for value in metrics.values())
    batch.batch["token_level_scores"] = SCORES
    metrics = metric_utils.compute_data_metrics(batch)
    assert [metrics[f"critic/score/{name}"] for name in ("mean", "max", "min")] == [2.0, 3.0, 1.0]


def test_distance_between_sampler_and_policy() -> None:
    batch = batch_of_three()
    rollout = batch.batch["old_log_probs"].clone()
    rollout[0, 0] = math.log(0.5)  # the policy's is e^-1 = 0.36788
    batch.batch["rollout_log_probs"] = rollout
    metrics = metric_utils.compute_data_metrics(batch)
    by_hand = {
        "training/rollout_probs_diff_max": 0.5 - math.exp(-1),
        "training/rollout_probs_diff_mean": (0.5 - math.exp(-1)) / 6,
        "training/rollout_log_probs_diff_max": 1 - math.log(2),
        "rollout_corr/kl": (1 - math.log(2)) / 6,
    }
    assert {key: metrics[key] for key in by_hand} == pytest.approx(by_hand)
    batch.batch["rollout_is_weights"] = torch.tensor([[2.0, 1, 1, 1], [1, 0, NAN, NAN], [NAN] * 4])
    metrics = metric_utils.compute_data_metrics(batch)
    by_hand = {"mean": 1.0, "max": 2.0, "eff_sample_size": 36 / (6 * 8)}
    assert {key: metrics[f"rollout_corr/rollout_is_{key}"] for key in by_hand} == pytest.approx(by_hand)


def test_timing_per_token_and_throughput_per_rank() -> None:
    # 5 prompt and 9 response tokens.
    timing = {"gen": 0.9, "update_actor": 1.4, "step": 3.5}
    assert metric_utils.compute_timing_metrics(batch_of_three(), timing) == pytest.approx(
        {f"timing_s/{name}": value for name, value in timing.items()}
        | {"timing_per_token_ms/gen": 100.0, "timing_per_token_ms/update_actor": 100.0}
    )
    assert metric_utils.compute_throughout_metrics(batch_of_three(), timing, n_gpus=2) == {
        "perf/total_num_tokens": 14.0,
        "perf/time_per_step": 3.5,
        "perf/throughput": pytest.approx(2.0),
        "perf/generated_tokens_per_s": pytest.approx(10.0),
    }


def test_validation_metrics() -> None:
    batch = batch_of_three()
    metrics = metric_utils.compute_validation_distill_metrics(batch)
    by_hand = {"reverse_kl": 0.1 + (MATH + ITEM) / 5, "math/reverse_kl": -0.375 + MATH / 4}
    by_hand |= {"item/reverse_kl": 2.0 + ITEM, "response_length": 3.0}
    assert {key: metrics[f"val/{key}"] for key in by_hand} == pytest.approx(by_hand)
    batch.batch["token_level_scores"] = SCORES
    rewards = {"val/reward": 2.0, "val/item/reward": 2.5, "val/math/reward": 1.0}
    batch.non_tensor_batch |= {"uid": np.array(["a", "b", "b"]), "reward_extra": np.array([{}, {}, {}])}
    best = {"val-core/item/reward/best@2/mean": pytest.approx(2.75, abs=0.05)}  # of 3 and 2: 3, but for two draws of 2
    means = {"val-core/math/reward/mean@1": 1.0, "val-core/item/reward/mean@2": 2.5}
    assert compute_validation_reward_metrics(batch) == rewards | means | best


def test_reduction_follows_the_name() -> None:
    metrics = {"actor/pg_loss": [1.0, 3.0], "perf/max_memory": [1, 5], "perf/min_free": [1, 5], "maximum/mean": [1, 3]}
    reduced = {"actor/pg_loss": 2.0, "perf/max_memory": 5.0, "perf/min_free": 1.0, "maximum/mean": 2.0}
    assert metric_utils.reduce_metrics(metrics) == reduced


def test_other_values_of_a_reward_function_are_averaged() -> None:
    batch = batch_of_three()
    extra = [
        {"format_ok": True, "note": "a", "seen": [1.0, 2.0]},
        {"format_ok": np.bool_(False), "rare": np.float32(0.5)},
        {"format_ok": torch.tensor(True), "none": None},
    ]
    batch.non_tensor_batch |= {"reward_extra": np.array(extra, dtype=object), "uid": np.array(["a", "b", "c"])}
    batch.batch["token_level_scores"] = SCORES
    for metrics, family in (
        (metric_utils.compute_data_metrics(batch), "reward_extra/"),
        (compute_validation_reward_metrics(batch), "val_reward_extra/"),
    ):
        expected = {f"{family}format_ok": pytest.approx(2 / 3), f"{family}rare": 0.5}
        expected |= {f"{family}math/format_ok": 1.0, f"{family}item/format_ok": 0.5, f"{family}item/rare": 0.5}
        assert {name: metrics[name] for name in metrics if name.startswith(family)} == expected


def batch_of_two_teachers() -> DataProto:
    """The same three rows; the second teacher knows item tokens and scores row 1, which is trained to its end."""
    batch = batch_of_three()
    batch.batch["ref_log_prob"][1] = torch.tensor([-3.0, -2.5, -1.0, NAN])
    batch.batch["old_log_probs"][1, 2] = -3.0
    batch.batch["extend_mass"][1, 2] = batch.batch["entropys"][1, 2] = 0.5
    batch.batch["response_mask"][1] = torch.tensor([1, 1, 1, 0])
    batch.batch["advantages"][1] = torch.tensor([-2.0, -2.0, 2.0, 0.0])
    batch.batch["teacher"] = torch.tensor([0, 1, 0])
    batch.non_tensor_batch["teacher_knows_extended"] = np.array([False, True, False], dtype=object)
    return batch


def test_metrics_per_teacher() -> None:
    further = {"self": TeacherConfig(sources=["item"])}
    config = AlgoConfig(adv_estimator="on_policy_distill", distill=DistillConfig(teachers=further))
    metrics = metric_utils.compute_on_policy_distill_data_metrics(batch_of_two_teachers(), config)
    by_hand = {
        "distill_teacher/ref/reverse_kl": -0.375 + MATH / 4,
        "distill_teacher/self/reverse_kl": 0.0,  # 2 and -2 at the shared tokens
        "distill_teacher/self/extend_reverse_kl": 2.0,  # -0.5 - -2.5
        "distill/extend_reverse_kl": 2.0,
        "distill_teacher/self/extend_adv_share": 2 / 6,
        "distill_teacher/ref/num_sequences": 2.0,
    }
    assert {key: metrics[key] for key in by_hand} == pytest.approx(by_hand)
    assert "distill_teacher/ref/extend_reverse_kl" not in metrics
    overall = {key.removeprefix("distill/") for key in metrics if key.startswith("distill/") and key.count("/") == 1}
    alone = metric_utils.compute_on_policy_distill_data_metrics(batch_of_two_teachers()[[1]], config)
    for name in overall:
        assert alone[f"distill/{name}"] == metrics[f"distill_teacher/self/{name}"], name


@pytest.mark.parametrize(("weight", "share"), [(1.0, 2 / 10.5), (2.0, 4 / 16.5), (0.0, 0.0)])
def test_the_share_of_item_tokens_counts_rows_by_the_weight_of_their_teacher(weight: float, share: float) -> None:
    # |A| of the first teacher's rows: 1, 0, 0.5, 3; of the second's: 2, 2 and, at the item token, 2.
    further = {"self": TeacherConfig(sources=["item"], weight=weight)}
    config = AlgoConfig(distill=DistillConfig(coef=0.5, teachers=further))
    metrics = metric_utils.compute_on_policy_distill_data_metrics(batch_of_two_teachers(), config)
    assert metrics["distill/extend_adv_share"] == pytest.approx(share)


def test_parts_of_a_summed_advantage() -> None:
    distill = DistillConfig(coef=0.5, teachers={"self": TeacherConfig(sources=["item"], weight=2.0)})
    batch = batch_of_two_teachers()
    config = AlgoConfig(distill_adv_max_clip=2.0, distill=distill)
    # Distillation: 0.5 x (-1, 0, -0.5, 2 clipped) in row 0 and 0.5 x 2 x (-2, -2, 2) in row 1. The task's: 1 and -1.
    part = torch.tensor([[-0.5, 0.0, -0.25, 1.0], [-2.0, -2.0, 2.0, 0.0], [0.0] * 4])
    batch.batch["advantages"] = part + torch.tensor([[1.0] * 4, [-1.0, -1.0, -1.0, 0.0], [0.0] * 4])
    metrics = metric_utils.compute_advantage_part_metrics(batch, config)
    by_hand = {
        "advantage/task_abs": 1.0,
        "advantage/distill_abs": 7.75 / 7,
        "advantage/distill_share": 7.75 / 14.75,
        "advantage/math/distill_share": 1.75 / 5.75,
        "advantage_teacher/self/distill_share": 6 / 9,
        "advantage_teacher/ref/distill_abs": 1.75 / 4,
    }
    assert {key: metrics[key] for key in by_hand} == pytest.approx(by_hand)


def test_leaks_of_validation_are_a_share_of_answers() -> None:
    metrics = metric_utils.compute_validation_distill_metrics(batch_of_three())
    by_hand = {"extend_seq_ratio": 2 / 3, "math/extend_seq_ratio": 0.0, "item/extend_seq_ratio": 1.0}
    assert {key: metrics[f"val/{key}"] for key in by_hand} == pytest.approx(by_hand)

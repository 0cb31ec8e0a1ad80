"""The teachers' scores of an exact objective are the same in an update as in a stage before it."""

from typing import Any

import pytest
import torch
from support.exact_cases import LEAK, Models, scored, workers
from support.tiny_workers import weights_of

from verl.config import DistillConfig

pytestmark = pytest.mark.usefixtures("one_rank")

ROWWISE = {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}


@pytest.mark.parametrize(
    ("objective", "packed", "teachers", "settings", "limits"),
    [
        ("forward_kl", False, 1, {"support": "full"}, ROWWISE),
        ("jsd", True, 3, {"support": "shared"}, {"ppo_max_token_len_per_gpu": 16}),
        ("exact", False, 3, {"support": "full"}, {"ppo_mini_batch_size": 4, "ppo_epochs": 2, **ROWWISE}),
        ("exact", True, 2, {"support": "shared", "coef": 0.7}, {"ppo_max_token_len_per_gpu": 24}),
    ],
)
def test_scores_and_update_are_those_of_a_stage_before(
    objective: str, packed: bool, teachers: int, settings: dict[str, Any], limits: dict[str, Any], models: Models
) -> None:
    """Base, full and stitched teachers by row; each scores item tokens, known to it or not."""
    distill, batch = models.distill(objective, teachers, **settings, **LEAK), models.batch(teachers)
    config = models.config(packed=packed, actor=limits)
    student, other = workers(config, distill), workers(config, distill)
    keys = [key for key in batch.batch.keys() if key not in ("advantages", "old_log_probs")]  # noqa: SIM118
    updated = student.update_actor(batch if distill.has_policy_loss else batch.select(keys))
    before = scored(other.colocated_roles, distill, batch.select())
    right = other.update_actor(before)
    assert len(right) == 0, "scores that are there already are not returned again"
    assert [*updated.batch.keys()] == ["ref_log_prob"]
    expected = before.tensor("ref_log_prob") * batch.tensor("response_mask")
    torch.testing.assert_close(updated.tensor("ref_log_prob"), expected, rtol=0, atol=1e-5)
    assert updated.meta_info == right.meta_info
    trained = weights_of(other)
    assert all(torch.equal(value, trained[name]) for name, value in weights_of(student).items())


def test_a_policy_loss_needs_an_advantage(models: Models) -> None:
    batch = models.batch()
    batch.pop(["advantages"])
    workers(models.config(), DistillConfig("exact")).update_actor(batch)
    with pytest.raises(KeyError, match="advantages"):
        workers(models.config(), DistillConfig("exact", coef=0.5)).update_actor(batch)

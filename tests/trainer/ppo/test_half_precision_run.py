"""The actor's precision is that of teachers and engine too, and a whole run in bf16 on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.in_process_run import run_in_process, settings
from support.launch import series, write_onerec_parquet

from verl.config import ActorRolloutRefConfig

pytestmark = pytest.mark.usefixtures("one_rank")

BF16 = {"fsdp_config": {"mixed_precision": {"param_dtype": "bf16"}}}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("auto", "auto", "auto")),
        ({"actor": BF16}, ("bf16", "bf16", "bf16")),
        ({"ref": BF16}, ("auto", "bf16", "auto")),
        ({"actor": BF16, "rollout": {"dtype": "float32"}}, ("bf16", "bf16", "float32")),
    ],
)
def test_auto_is_the_precision_of_the_actor(given: dict[str, Any], found: tuple[str, ...]) -> None:
    config = ActorRolloutRefConfig(**given)
    trained, frozen = (role.fsdp_config.mixed_precision.param_dtype for role in (config.actor, config.ref))
    assert (trained, frozen, config.rollout.dtype) == found


def test_a_student_learns_in_bf16_from_weights_in_fp32(tiny_pair: Any, tmp_path: Path) -> None:
    stored: dict[str, set[torch.dtype]] = {}
    computed: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}

    def watch(trainer: Any) -> None:
        student, teacher = trainer.actor_wg._worker._state.module, trainer.role_groups["ref"]._worker.model.module
        for role, module in (("student", student), ("teacher", teacher)):
            stored[role] = {parameter.dtype for parameter in module.parameters()}
            module.causal_lm.get_decoder().register_forward_hook(
                lambda _, args, output, role=role: computed[role].add(output.last_hidden_state.dtype)
            )
        stored["engine"] = {trainer.agent_loop_manager._replicas[0].actor._target.model.dtype}

    train = write_onerec_parquet(tmp_path / "train.parquet", 9)
    changes = {
        "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "bf16",
        "algorithm.distill.objective": "exact",
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "trainer.total_training_steps": 6,
        "trainer.save_freq": 6,
    }
    run_in_process(settings(tiny_pair, train, tmp_path / "run", **changes), tamper=watch)
    half = {torch.bfloat16}
    assert stored == {"student": {torch.float32}, "teacher": half, "engine": half}
    assert computed == {"student": half, "teacher": half}
    losses, gaps = (series(tmp_path / "run", key) for key in ("actor/distill_loss", "distill/engine_gap"))
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert len(gaps) == 6 and all(1e-4 < gap < 0.05 for gap in gaps), "rounding, and no more"

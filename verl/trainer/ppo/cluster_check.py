"""What each node of a cluster has to hold for a run, checked before the first worker starts.

In: the configuration, and the pools whose places are reserved. Out: nothing, or a ValueError that names nodes.

==================================  ===================================================================
read by                             what
==================================  ===================================================================
student's ranks, engines beside     student's model and tokenizer, the checkpoint to go on from
agent-loop workers (same nodes)     the tools' configuration
teacher's ranks                     that teacher's model and tokenizer
driver alone                        data files, reward function: ``preflight`` looked at them already
==================================  ===================================================================
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.config import PPOConfig
from verl.single_controller.ray.node_check import check_nodes_hold
from verl.single_controller.ray.node_report import DISTRIBUTIONS, NeededPath
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.ppo.worker_groups import ResourcePoolManager


def check_nodes(config: PPOConfig, pools: ResourcePoolManager) -> None:
    """See that every node of the pools holds what its processes will read, and runs the driver's code and packages.

    Raises:
        ValueError: what is missing or differs, and where.
    """
    packages = [name for name in DISTRIBUTIONS if name != "vllm" or config.actor_rollout_ref.rollout.name == "vllm"]
    node_ips: dict[str, str] = {}
    needed: dict[str, list[NeededPath]] = {}
    with _marked_run_folder(config) as marker:
        for role in pools.mapping:
            paths = student_paths(config) + marker if role == "actor" else teacher_paths(config, role)
            for place in pools.places(role):
                node_ips[place.node_id] = place.node_ip
                already = needed.setdefault(place.node_id, [])
                already += [path for path in paths if path not in already]
        check_nodes_hold(needed, node_ips, packages)


def student_paths(config: PPOConfig) -> list[NeededPath]:
    """What the student's ranks, the engines and the agent-loop workers read."""
    model, trainer = config.actor_rollout_ref.model, config.trainer
    return _set_ones(
        {
            "actor_rollout_ref.model.path": model.path,
            "actor_rollout_ref.model.tokenizer_path": model.tokenizer_path,
            "actor_rollout_ref.rollout.multi_turn.tool_config_path": (
                config.actor_rollout_ref.rollout.multi_turn.tool_config_path
            ),
            "trainer.resume_from_path": trainer.resume_from_path if trainer.resume_mode == "resume_path" else None,
        }
    )


def teacher_paths(config: PPOConfig, role: str) -> list[NeededPath]:
    """What a teacher's ranks read; without a path of its own the student's starting weights are the teacher."""
    student, base = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    further = config.algorithm.distill.teachers.get(role)
    if further is not None:
        path = further.path
        own = {f"algorithm.distill.teachers.{role}.path": path}
    else:
        path = base.path
        own = {
            "actor_rollout_ref.ref.model.path": path,
            "actor_rollout_ref.ref.model.tokenizer_path": base.tokenizer_path,
        }
    if path:
        return _set_ones(own)
    shared = {
        "actor_rollout_ref.model.path": student.path,
        "actor_rollout_ref.model.tokenizer_path": student.tokenizer_path,
    }
    return _set_ones(own | shared)


def _set_ones(paths: dict[str, str | None]) -> list[NeededPath]:
    return [NeededPath(key, path) for key, path in paths.items() if path]


@contextmanager
def _marked_run_folder(config: PPOConfig) -> Iterator[list[NeededPath]]:
    """A file in the run's folder that its nodes must see, where ranks write or read checkpoints there side by side."""
    trainer = config.trainer
    if not trainer.saves_checkpoints and checkpoint.find_checkpoint(trainer) is None:
        yield []
        return
    folder = Path(trainer.default_local_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-nodes-") as marker:
        yield [NeededPath("trainer.default_local_dir (the driver's file in it)", marker.name)]

"""Which pools a run asks for, and what each node has to hold; no Ray runs here."""

from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TeacherConfig, TrainerConfig
from verl.single_controller.ray.resource_pool import RankPlace
from verl.trainer.ppo import cluster_check
from verl.trainer.ppo.cluster_check import check_nodes, student_paths, teacher_paths
from verl.trainer.ppo.worker_groups import ResourcePoolManager, plan_pools

ROLES = ["actor", "ref"]


def test_a_teacher_shares_the_students_ranks_unless_it_has_its_own() -> None:
    shared = plan_pools(TrainerConfig(nnodes=2, n_gpus_per_node=4), ROLES, use_gpu=True)
    assert shared.resource_pool_spec == {"train": [4, 4]}
    assert shared.mapping == {"actor": "train", "ref": "train"}
    apart = plan_pools(
        TrainerConfig(nnodes=2, n_gpus_per_node=4, teacher_nnodes=1, teacher_n_gpus_per_node=8), ROLES, use_gpu=True
    )
    assert apart.resource_pool_spec == {"train": [4, 4], "teacher": [8]}
    assert apart.mapping == {"actor": "train", "ref": "teacher"}
    assert (shared.get_n_gpus(), apart.get_n_gpus()) == (8, 16)


def test_gpus_for_a_teacher_that_nobody_asks_are_refused() -> None:
    config = TrainerConfig(teacher_nnodes=1, teacher_n_gpus_per_node=8)
    with pytest.raises(ValueError, match=r"trainer.teacher_nnodes=1 and trainer.teacher_n_gpus_per_node=8 give GPUs"):
        plan_pools(config, ["actor"], use_gpu=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_nnodes": 1}, r"teacher_nnodes=1 and trainer.teacher_n_gpus_per_node=None go together"),
        ({"teacher_n_gpus_per_node": 2}, r"teacher_nnodes=None and trainer.teacher_n_gpus_per_node=2 go together"),
        ({"teacher_nnodes": 0, "teacher_n_gpus_per_node": 2}, r"teacher_nnodes=0 must be at least 1, or null"),
    ],
)
def test_half_a_teacher_pool_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)


# ------------------------------------------------------------------------------ what each node has to hold


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder / "run"), **trainer))
    models = config.actor_rollout_ref
    models.model.path, models.ref.model.path = "/student", "/teacher"
    return config


STUDENT, TEACHER = {"actor_rollout_ref.model.path": "/student"}, {"actor_rollout_ref.ref.model.path": "/teacher"}


def test_student_and_teachers_read_their_own_models_or_the_students(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    further = {"self": TeacherConfig(sources=["rec_*"]), "coder": TeacherConfig(path="/coder", sources=["code"])}
    config.algorithm.distill.teachers = further
    assert student_paths(config) == STUDENT
    assert teacher_paths(config, "ref") == TEACHER
    assert teacher_paths(config, "self") == STUDENT
    assert teacher_paths(config, "coder") == {"algorithm.distill.teachers.coder.path": "/coder"}
    config.actor_rollout_ref.ref.model.path = None
    config.actor_rollout_ref.rollout.multi_turn.tool_config_path = "/tools.yaml"
    assert teacher_paths(config, "ref") == STUDENT
    tools = {"actor_rollout_ref.rollout.multi_turn.tool_config_path": "/tools.yaml"}
    assert student_paths(config) == STUDENT | tools


class Cluster:
    """Two nodes with a pool each; notes what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools = ResourcePoolManager({"train": [1], "teacher": [1]}, {"actor": "train", "ref": "teacher"})
        nodes = {"actor": "n1", "ref": "n2"}
        group: Any = None
        monkeypatch.setattr(self.pools, "places", lambda role: [RankPlace(group, 0, nodes[role], nodes[role] + ".net")])
        monkeypatch.setattr(cluster_check, "check_nodes_hold", self.check)

    def check(self, needed: dict[str, dict[str, str]], node_ips: dict[str, str], packages: list[str]) -> None:
        assert node_ips == {"n1": "n1.net", "n2": "n2.net"}
        self.needed, self.packages = needed, packages
        self.seen = [Path(path).is_file() for path in needed["n1"].values()]


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_every_node_is_asked_for_what_its_ranks_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    cluster, config = Cluster(monkeypatch), make_config(tmp_path)
    config.actor_rollout_ref.rollout.name = engine
    check_nodes(config, cluster.pools)
    assert cluster.needed == {"n1": STUDENT, "n2": TEACHER}
    assert ("vllm" in cluster.packages) == (engine == "vllm"), "counts only where it is used"


def test_ranks_that_save_have_to_see_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    check_nodes(make_config(tmp_path, save_freq=1), cluster.pools)
    assert list(cluster.needed["n1"]) == [*STUDENT, "trainer.default_local_dir (the driver's file in it)"]
    assert cluster.seen == [False, True]
    assert cluster.needed["n2"] == TEACHER
    assert not list((tmp_path / "run").iterdir()), "the driver's file is gone again"

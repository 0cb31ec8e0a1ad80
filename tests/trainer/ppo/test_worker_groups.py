"""Which pools a run asks for, and what each node has to hold; no Ray runs here."""

from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TeacherConfig, TrainerConfig
from verl.single_controller.ray import node_check
from verl.single_controller.ray.node_report import NeededPath, NodeReport
from verl.single_controller.ray.resource_pool import RankPlace
from verl.trainer.ppo import cluster_check
from verl.trainer.ppo.cluster_check import check_nodes, student_paths, teacher_paths
from verl.trainer.ppo.worker_groups import ResourcePoolManager, plan_pools

ROLES = ["actor", "ref"]


def test_a_teacher_shares_the_students_ranks_unless_it_has_its_own() -> None:
    shared = plan_pools(TrainerConfig(nnodes=2, n_gpus_per_node=4), ROLES, use_gpu=True)
    assert shared.resource_pool_spec == {"train": [4, 4]}
    assert shared.mapping == {"actor": "train", "ref": "train"}
    assert shared.roles_of("train") == ["actor", "ref"]
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
    models.model.path, models.ref.model.path = str(folder / "student"), str(folder / "teacher")
    for name in ("student", "teacher"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    return config


def test_student_and_teacher_read_their_own_models(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert student_paths(config) == [NeededPath("actor_rollout_ref.model.path", str(tmp_path / "student"))]
    assert teacher_paths(config, "ref") == [NeededPath("actor_rollout_ref.ref.model.path", str(tmp_path / "teacher"))]
    config.actor_rollout_ref.ref.model.path = None
    config.actor_rollout_ref.rollout.multi_turn.tool_config_path = "/tools.yaml"
    assert teacher_paths(config, "ref") == [NeededPath("actor_rollout_ref.model.path", str(tmp_path / "student"))]
    assert [need.key.rpartition(".")[2] for need in student_paths(config)] == ["path", "tool_config_path"]


def test_further_teachers_read_models_of_their_own_or_the_students(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    further = {"self": TeacherConfig(sources=["rec_*"]), "coder": TeacherConfig(path="/coder", sources=["code"])}
    config.algorithm.distill.teachers = further
    assert teacher_paths(config, "self") == [NeededPath("actor_rollout_ref.model.path", str(tmp_path / "student"))]
    assert teacher_paths(config, "coder") == [NeededPath("algorithm.distill.teachers.coder.path", "/coder")]


class Cluster:
    """Two nodes with a pool each, and what they answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lacks: dict[str, str] = {}
        self.asked: dict[str, list[str]] = {}
        self.pools = ResourcePoolManager({"train": [1], "teacher": [1]}, {"actor": "train", "ref": "teacher"})
        nodes = {"actor": "n1", "ref": "n2"}
        group: Any = None
        monkeypatch.setattr(self.pools, "places", lambda role: [RankPlace(group, 0, nodes[role], nodes[role] + ".net")])
        monkeypatch.setattr(node_check, "_ask", self.ask)

    def ask(self, paths: dict[str, list[str]], packages: list[str]) -> dict[str, NodeReport | str]:
        self.asked = paths
        answers: dict[str, NodeReport | str] = {}
        for node, wanted in paths.items():
            report = NodeReport(**node_check.read_node(wanted, packages))
            gone = {path: None for path in wanted if node in self.lacks and path.startswith(self.lacks[node])}
            answers[node] = NodeReport({**report.files, **gone}, report.versions, report.sources)
        return answers


def test_every_node_is_asked_for_what_its_ranks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    check_nodes(make_config(tmp_path), cluster.pools)
    assert cluster.asked == {"n1": [str(tmp_path / "student")], "n2": [str(tmp_path / "teacher")]}


def test_what_is_missing_where_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    cluster.lacks = {"n1": str(tmp_path / "run"), "n2": str(tmp_path / "teacher")}
    with pytest.raises(ValueError, match="the cluster is not ready for this run") as caught:
        check_nodes(make_config(tmp_path, save_freq=1), cluster.pools)
    lines = str(caught.value).splitlines()[1:]
    assert lines[0].startswith("  node n1.net: trainer.default_local_dir (the driver's file in it)=")
    assert lines[1].startswith(f"  node n2.net: actor_rollout_ref.ref.model.path={tmp_path / 'teacher'} does not exist")
    assert not list((tmp_path / "run").iterdir()), "the driver's file is gone again"


def test_a_name_on_a_hub_is_nobodys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    config.actor_rollout_ref.model.path = "owner/name"
    cluster = Cluster(monkeypatch)
    check_nodes(config, cluster.pools)
    assert cluster.asked["n1"] == []


def test_a_node_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    monkeypatch.setattr(node_check, "_ask", lambda paths, packages: dict.fromkeys(paths, "it could not be asked"))
    with pytest.raises(ValueError, match=r"nodes n1.net, n2.net: it could not be asked"):
        check_nodes(make_config(tmp_path), cluster.pools)


def test_vllm_counts_only_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[list[str]] = []
    monkeypatch.setattr(cluster_check, "check_nodes_hold", lambda needed, ips, packages: counted.append(packages))
    config = make_config(tmp_path)
    for engine in ("vllm", "hf"):
        config.actor_rollout_ref.rollout.name = engine
        check_nodes(config, Cluster(monkeypatch).pools)
    assert "vllm" in counted[0] and "vllm" not in counted[1]

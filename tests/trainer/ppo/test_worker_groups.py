"""Which pools a run asks for, and what each node has to hold; no Ray runs here."""

from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, RefConfig, TeacherConfig, TrainerConfig
from verl.single_controller.ray.resource_pool import RankPlace
from verl.trainer.ppo import worker_groups
from verl.trainer.ppo.worker_groups import WorkerGroups, check_nodes, teacher_paths

ROLES = ["actor", "ref"]


def test_a_teacher_shares_the_students_ranks_unless_it_has_its_own() -> None:
    student = {"nnodes": 2, "n_gpus_per_node": 4}
    assert planned(**student) == ({"train": [4, 4]}, {"actor": "train", "ref": "train"})
    apart = planned(**student, teacher_nnodes=1, teacher_n_gpus_per_node=8)
    assert apart == ({"train": [4, 4], "teacher": [8]}, {"actor": "train", "ref": "teacher"})
    served = planned(**student, teacher_nnodes=1, teacher_n_gpus_per_node=8, teacher=RefConfig(engine="vllm"))
    assert served == ({"train": [4, 4], "teacher": [8]}, {"actor": "train", "self": "train", "ref": "teacher"})
    engines = planned(**student, rollout_nnodes=3, rollout_n_gpus_per_node=8)
    assert engines == ({"train": [4, 4], "rollout": [8, 8, 8]}, {"actor": "train", "ref": "train"})


def planned(teacher: RefConfig | None = None, **trainer: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    config = PPOConfig(trainer=TrainerConfig(**trainer))
    config.actor_rollout_ref.ref = teacher or RefConfig()
    groups = WorkerGroups(config, [*ROLES, "self"] if teacher else ROLES)
    return {name: pool.process_on_nodes for name, pool in groups.pools.items()}, groups.pool_of


def test_gpus_for_a_teacher_that_nobody_asks_are_refused() -> None:
    config = PPOConfig(trainer=TrainerConfig(teacher_nnodes=1, teacher_n_gpus_per_node=8))
    with pytest.raises(ValueError, match="teacher_nnodes=1, teacher_n_gpus_per_node=8: this run uses no teacher"):
        WorkerGroups(config, ["actor"])


# ------------------------------------------------------------------------------ what each node has to hold


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder / "run"), **trainer))
    models = config.actor_rollout_ref
    models.model.path, models.ref.model.path = "/student", "/teacher"
    return config


STUDENT, TEACHER = {"actor_rollout_ref.model.path": "/student"}, {"actor_rollout_ref.ref.model.path": "/teacher"}


def test_teachers_without_a_path_are_the_students_starting_weights(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    teachers = config.algorithm.distill.teachers
    teachers["coder"] = TeacherConfig(path="/coder", sources=["code"])
    coder = {"algorithm.distill.teachers.coder.path": "/coder"}
    assert held(teacher_paths(config)) == TEACHER | coder
    teachers["self"] = TeacherConfig(sources=["rec_*"])
    assert held(teacher_paths(config)) == TEACHER | coder | STUDENT


def held(paths: dict[str, str | None]) -> dict[str, str]:
    return {key: path for key, path in paths.items() if path}


@pytest.mark.parametrize(("engine", "save_freq", "engines"), [("vllm", -1, None), ("hf", 1, None), ("hf", 1, 1)])
def test_every_node_is_asked_for_what_its_ranks_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, save_freq: int, engines: int | None
) -> None:
    """Ranks that save have to see the driver's file in the run's folder, which is gone afterwards."""
    resumes = {"resume_mode": "resume_path", "resume_from_path": "/there"} if save_freq > 0 else {}
    apart = {"rollout_nnodes": engines, "rollout_n_gpus_per_node": engines}
    config = make_config(tmp_path, save_freq=save_freq, **apart, **resumes)
    config.actor_rollout_ref.rollout.name = engine
    groups = WorkerGroups(config, ROLES)
    group: Any = None
    monkeypatch.setattr(groups, "places", lambda role: [RankPlace(group, 0, f"node of {role}", f"{role}.net")])

    def check(needed: dict[str, dict[str, str]], node_ips: dict[str, str], packages: list[str]) -> None:
        if engines:
            assert node_ips.pop("node of rollout") == "rollout.net"
            assert needed["node of rollout"] == STUDENT, "engines alone save nothing, and resume from nothing"
        assert node_ips == {"node of actor": "actor.net", "node of ref": "ref.net"}
        assert needed["node of ref"] == TEACHER
        student = needed["node of actor"]
        folder = student.pop("trainer.default_local_dir (the driver's file in it)", None)
        assert student == STUDENT | ({"trainer.resume_from_path": "/there"} if resumes else {})
        assert Path(folder).is_file() if folder else save_freq < 0
        assert ("vllm" in packages) == (engine == "vllm"), "counts only where it is used"

    monkeypatch.setattr(worker_groups, "check_nodes_hold", check)
    check_nodes(config, groups)
    assert not list(tmp_path.glob("run/*"))

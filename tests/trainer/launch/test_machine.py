"""What this machine has for a run, checked before Ray starts."""

from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.launch.machine import check_ranks, prepare_folder


def check(ray_init: dict[str, Any], **trainer: Any) -> None:
    config = PPOConfig(trainer=TrainerConfig(**trainer))
    config.ray_kwargs.ray_init = ray_init
    check_ranks(config, "cpu")


def test_both_pools_fit() -> None:
    check({"num_cpus": 2}, n_gpus_per_node=8)
    check({"num_cpus": 2}, n_gpus_per_node=4, teacher_nnodes=1, teacher_n_gpus_per_node=4)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"n_gpus_per_node": 16}, "trainer.n_gpus_per_node=16: this machine can hold 8 ranks .* lower it so far"),
        (
            {"n_gpus_per_node": 4, "teacher_nnodes": 1, "teacher_n_gpus_per_node": 8},
            "n_gpus_per_node=4 and trainer.teacher_n_gpus_per_node=8: this machine can hold 8 ranks .* lower them",
        ),
        ({"nnodes": 2}, "trainer.nnodes=2 and no cluster is named"),
        ({"teacher_nnodes": 2, "teacher_n_gpus_per_node": 1}, "trainer.teacher_nnodes=2 and no cluster is named"),
    ],
)
def test_ranks_that_do_not_fit_are_counted(trainer: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check({"num_cpus": 2}, **trainer)


def test_ray_checks_a_cluster() -> None:
    check({"address": "auto"}, nnodes=32, n_gpus_per_node=8, teacher_nnodes=8, teacher_n_gpus_per_node=8)


def test_the_folder_of_a_run_is_made_and_must_be_writable(tmp_path: Path) -> None:
    prepare_folder(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"trainer\.default_local_dir=.*/file/run .* cannot be written: .*; name a folder"
    ):
        prepare_folder(str(tmp_path / "file" / "run"))

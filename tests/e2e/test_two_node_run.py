"""A run on a Ray cluster of two nodes (two raylets of this machine) that somebody else started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from support.launch import Run, launch, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import REPO, Pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the cluster's head answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def run(pair: Pair, folder: Path, address: str, **changes: object) -> Run:
    env = script_env(pair, write_onerec_parquet(folder / "train.parquet", 16))
    return launch(folder / "run", small_run("hf", 1, 2, **{"ray_kwargs.ray_init.address": address, **changes}), env)


def test_student_on_both_nodes_and_a_teacher_of_its_own(tiny_pair: Pair, address: str, tmp_path: Path) -> None:
    pools = {"trainer.nnodes": 2, "trainer.teacher_nnodes": 1, "trainer.teacher_n_gpus_per_node": 1}
    finished = run(tiny_pair, tmp_path, address, **pools)
    assert finished.returncode == 0, finished.output[-6000:]
    assert "pool train: 2 rank(s) on 2 node(s), each rank with CPU 0.25, GPU 0, for actor" in finished.output
    assert len(finished.series("distill/reverse_kl")) == 2
    assert (finished.folder / "global_step_2").is_dir()
    assert not list(finished.folder.glob(".seen-by-all-nodes-*"))


def test_a_pool_that_the_cluster_cannot_hold_is_said_in_the_last_lines(
    tiny_pair: Pair, address: str, tmp_path: Path
) -> None:
    finished = run(tiny_pair, tmp_path, address, **{"trainer.nnodes": 4})
    assert finished.returncode == 1
    assert (
        "error: 'train' asks for 4 rank(s) on 4 node(s), each rank with CPU 0.25, GPU 0; the cluster" in finished.output
    )
    assert "Traceback" not in finished.output

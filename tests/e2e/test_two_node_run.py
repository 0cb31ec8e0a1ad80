"""A run on a Ray cluster of two nodes (two raylets of this machine) that somebody else started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from support.launch import launch, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and one more node, of a CPU each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def test_student_on_both_nodes_and_a_teacher_of_its_own(cluster: Cluster, tiny_pair: Pair, tmp_path: Path) -> None:
    """With an exact objective, for which hidden states and heads go from the teacher's node to the student's."""
    changes = {
        "ray_kwargs.ray_init.address": cluster.address,
        "trainer.nnodes": 2,
        "trainer.teacher_nnodes": 1,
        "trainer.teacher_n_gpus_per_node": 1,
        "algorithm.distill.objective": "exact",
        "++algorithm.distill.teachers": "{self:{sources:[sums]}}",
    }
    env = script_env(tiny_pair, write_onerec_parquet(tmp_path / "train.parquet", 16))
    finished = launch(tmp_path / "run", small_run("hf", 1, 2, **changes), env)
    assert "pool train: 2 rank(s) on 2 node(s), 0.25 CPU and no GPU each, for actor" in finished.output
    assert "pool teacher: 1 rank(s) on 1 node(s), 0.25 CPU and no GPU each, for ref" in finished.output
    assert len(finished.series("distill/reverse_kl")) == len(finished.series("actor/distill_loss")) == 2
    assert (finished.folder / "global_step_2").is_dir()
    assert not list(finished.folder.glob(".seen-by-all-nodes-*"))


def test_engines_of_their_own_on_a_node_without_ranks(cluster: Cluster, tiny_pair: Pair, tmp_path: Path) -> None:
    """The weights of every step reach them, and each answers: no answer is of other weights than the last sync's."""
    changes = {
        "ray_kwargs.ray_init.address": cluster.address,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "trainer.rollout_nnodes": 2,
        "trainer.rollout_n_gpus_per_node": 1,
        "trainer.save_freq": -1,
    }
    env = script_env(tiny_pair, write_onerec_parquet(tmp_path / "train.parquet", 24))
    finished = launch(tmp_path / "run", small_run("hf", 1, 3, **changes), env)
    assert "pool rollout: 2 rank(s) on 2 node(s), 0.25 CPU and no GPU each, for engines" in finished.output
    assert max(finished.series("training/rollout_log_probs_diff_max")) < 1e-4

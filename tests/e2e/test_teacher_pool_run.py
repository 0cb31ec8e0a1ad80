"""A whole run whose teacher has a rank of its own does what the co-located one does, metric by metric."""

from pathlib import Path

import pytest
from support.launch import Run, launch, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

pytestmark = pytest.mark.slow
OVERRIDES = small_run("hf", 1, 2, **{"actor_rollout_ref.actor.optim.lr": 1e-3, "trainer.save_freq": -1})
EXACT = [
    "algorithm.distill.objective=exact",
    "algorithm.distill.support=shared",
    "algorithm.distill.leak_coef=1",
    "++algorithm.distill.teachers={self:{sources:[sums]},mixed:{vocabulary:stitched,sources:[lett*]}}",
]
METRICS = ["distill/reverse_kl", "actor/grad_norm"]


def run(pair: Pair, folder: Path, *overrides: str) -> Run:
    folder.mkdir()
    train = write_onerec_parquet(folder / "train.parquet", 16, sources=("letters", "sums", "names"))
    finished = launch(folder / "run", [*OVERRIDES, *overrides], script_env(pair, train))
    assert finished.returncode == 0, finished.output[-6000:]
    return finished


@pytest.mark.parametrize(
    ("objective", "metrics", "rel"),
    [
        ([], ["actor/pg_loss", "critic/advantages/mean", "response_length/mean"], 0),
        (EXACT, ["distill/sampled_gap", "actor/distill_loss"], 1e-4),
    ],
    ids=["sampled", "exact"],
)
def test_a_teacher_in_its_own_pool_changes_no_metric(
    tiny_pair: Pair, tmp_path: Path, objective: list[str], metrics: list[str], rel: float
) -> None:
    beside = run(tiny_pair, tmp_path / "beside", *objective)
    own_pool = ["trainer.teacher_nnodes=1", "trainer.teacher_n_gpus_per_node=1"]
    apart = run(tiny_pair, tmp_path / "apart", *objective, *own_pool)
    assert "pool teacher: 1 rank(s) on 1 node(s), each rank with CPU 0.25, GPU 0, for ref" in apart.output
    for name in METRICS + metrics:
        assert len(beside.series(name)) == 2
        assert apart.series(name) == pytest.approx(beside.series(name), rel=rel, abs=rel / 100), name

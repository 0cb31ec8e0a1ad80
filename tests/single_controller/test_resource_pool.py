"""Whether a cluster can hold pools, from plain numbers; no Ray runs here."""

import re
from typing import Any

import pytest

from verl.single_controller.ray.resource_pool import RayResourcePool, check_capacity

GPUS_8, GPUS_4, CPUS = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 2.0}


def check(cluster: list[dict[str, float]], student: list[int], teacher: list[int] | None = None) -> None:
    nodes = [{"NodeManagerAddress": f"10.0.0.{i}", "Resources": has, "Alive": True} for i, has in enumerate(cluster)]
    nodes.append({"NodeManagerAddress": "10.0.0.99", "Resources": {"CPU": 999.0, "GPU": 999.0}, "Alive": False})
    pools = [RayResourcePool(student, use_gpu=cluster != [CPUS], name_prefix="train")]
    if teacher:
        pools.append(RayResourcePool(teacher, name_prefix="teacher", settings="trainer.teacher_nnodes"))
    check_capacity(pools, nodes)


@pytest.mark.parametrize(
    ("cluster", "pools"),
    [
        ([CPUS], ([8],)),
        ([GPUS_8, GPUS_4], ([4, 8],)),
        ([GPUS_8, GPUS_4], ([4], [8])),
        ([GPUS_4, GPUS_8], ([8], [4])),
        ([GPUS_8, GPUS_8], ([6, 6], [2, 2])),
    ],
    ids=["4 ranks per CPU", "uneven", "the larger first", "whichever it is", "beside each other"],
)
def test_what_fits_passes(cluster: list[dict[str, float]], pools: Any) -> None:
    check(cluster, *pools)


@pytest.mark.parametrize(
    ("cluster", "pools", "message"),
    [
        ([CPUS], ([9],), "'train' asks for 9 rank(s) on 1 node(s), 0.25 CPU and no GPU each; the cluster has"),
        (
            [GPUS_8],
            ([1, 1],),
            "1 GPU each; the cluster has node 10.0.0.0: 64 CPU and 8 GPU. Lower trainer.n_gpus_per_node",
        ),
        ([GPUS_4, GPUS_4], ([8],), "node 10.0.0.0: 64 CPU and 4 GPU; node 10.0.0.1: 64 CPU and 4 GPU."),
        ([GPUS_8, GPUS_8], ([8, 8], [8]), "1 CPU and 1 GPU each, beside 'train': 16 rank(s) on 2 node(s)"),
    ],
    ids=["too many ranks", "nodes are machines", "packed", "taken by the other"],
)
def test_what_does_not_fit_says_what_is_asked_for_and_what_there_is(
    cluster: list[dict[str, float]], pools: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(cluster, *pools)

"""Which replica runs where, beside which of the student's ranks."""

import pytest

from verl.experimental.agent_loop.actors import Place, plan_replicas


def ranks(nodes: int, per_node: int, first_gpu: int = 0) -> list[dict]:
    return [
        {
            "rank": node * per_node + local,
            "local_rank": local,
            "node_id": f"n{node}",
            "node_ip": f"10.0.0.{node}",
            "cuda_visible_devices": str(first_gpu + local),
        }
        for node in range(nodes)
        for local in range(per_node)
    ]


@pytest.mark.parametrize("engines", [1, 2])
def test_cpu_has_so_many_replicas_per_node(engines: int) -> None:
    nodes = [("n0", "10.0.0.0", None, (0, 1, 2))] * engines + [("n1", "10.0.0.1", None, (3, 4, 5))] * engines
    expected = [Place(index, *node) for index, node in enumerate(nodes)]
    assert plan_replicas(ranks(2, 3), "cpu", 1, engines) == expected


@pytest.mark.parametrize(
    ("parallel", "devices"), [(1, ["2", "3", "4", "5"] * 2), (2, ["2,3", "4,5"] * 2), (4, ["2,3,4,5"] * 2)]
)
def test_cuda_has_one_replica_per_group_of_neighbours(parallel: int, devices: list[str]) -> None:
    """A teacher's ranks on GPUs 0 and 1 of each node do not come in."""
    shuffled = sorted(ranks(2, 4, first_gpu=2), key=lambda rank: rank["local_rank"])
    places = plan_replicas(shuffled, "cuda", parallel)
    assert [place.cuda_visible_devices for place in places] == devices
    assert [place.index for place in places] == list(range(len(devices)))
    assert [place.ranks for place in places] == [tuple(range(i, i + parallel)) for i in range(0, 8, parallel)]


def test_ranks_that_see_all_gpus_of_their_node_use_their_own() -> None:
    all_visible = [rank | {"cuda_visible_devices": "4,5,6,7"} for rank in ranks(1, 4)]
    assert [place.cuda_visible_devices for place in plan_replicas(all_visible, "cuda", 2)] == ["4,5", "6,7"]

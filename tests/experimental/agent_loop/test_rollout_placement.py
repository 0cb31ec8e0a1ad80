"""Which replica runs where."""

import pytest

from verl.experimental.agent_loop.placement import ReplicaPlace, plan_replicas


def ranks(nodes: int, per_node: int) -> list[dict]:
    return [
        {
            "rank": node * per_node + local,
            "local_rank": local,
            "node_id": f"n{node}",
            "node_ip": f"10.0.0.{node}",
            "cuda_visible_devices": str(local),
        }
        for node in range(nodes)
        for local in range(per_node)
    ]


def test_cpu_has_one_replica_per_node() -> None:
    places = plan_replicas(ranks(2, 3), "cpu", 1)
    assert places == [
        ReplicaPlace(0, "n0", "10.0.0.0", None, (0, 1, 2)),
        ReplicaPlace(1, "n1", "10.0.0.1", None, (3, 4, 5)),
    ]


@pytest.mark.parametrize(
    ("parallel", "devices"), [(1, ["0", "1", "2", "3"] * 2), (2, ["0,1", "2,3"] * 2), (4, ["0,1,2,3"] * 2)]
)
def test_cuda_has_one_replica_per_group_of_neighbours(parallel: int, devices: list[str]) -> None:
    shuffled = sorted(ranks(2, 4), key=lambda rank: rank["local_rank"])
    places = plan_replicas(shuffled, "cuda", parallel)
    assert [place.cuda_visible_devices for place in places] == devices
    assert [place.index for place in places] == list(range(len(devices)))
    assert [place.node_id for place in places] == sorted(place.node_id for place in places)


def test_ranks_that_see_all_gpus_of_their_node_use_their_own() -> None:
    all_visible = [rank | {"cuda_visible_devices": "4,5,6,7"} for rank in ranks(1, 4)]
    assert [place.cuda_visible_devices for place in plan_replicas(all_visible, "cuda", 2)] == ["4,5", "6,7"]


def test_a_rank_without_a_gpu_is_named() -> None:
    with pytest.raises(ValueError, match=r"training rank 1 on node 10.0.0.0 has no GPU"):
        plan_replicas([ranks(1, 2)[0], ranks(1, 2)[1] | {"cuda_visible_devices": None}], "cuda", 1)


def test_a_node_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 does not divide the 3 GPUs of node 10.0.0.0"):
        plan_replicas(ranks(1, 3), "cuda", 2)


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_replica_on_gpus_is_beside_the_ranks_that_use_them(parallel: int) -> None:
    places = plan_replicas(ranks(2, 2), "cuda", parallel)
    assert [place.ranks for place in places] == [tuple(range(i, i + parallel)) for i in range(0, 4, parallel)]


def test_gpus_of_other_pools_are_nobodys() -> None:
    """A teacher's ranks on GPUs 0 and 1 of the node do not come in; the student's replica has 2 and 3."""
    student = [rank | {"cuda_visible_devices": str(rank["local_rank"] + 2)} for rank in ranks(1, 2)]
    assert [place.cuda_visible_devices for place in plan_replicas(student, "cuda", 2)] == ["2,3"]

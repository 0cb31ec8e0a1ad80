"""Which replica runs where, and which export of a weight bucket it reads."""

import pytest

from verl.experimental.agent_loop.placement import ReplicaPlace, bucket_for, plan_replicas


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
    assert places == [ReplicaPlace(0, "n0", "10.0.0.0", None), ReplicaPlace(1, "n1", "10.0.0.1", None)]


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


def test_a_cpu_replica_reads_the_export_of_its_own_node() -> None:
    placements = ranks(2, 2)
    infos = [{"path": "a"}, None, None, {"path": "b"}]
    places = plan_replicas(placements, "cpu", 1)
    assert [bucket_for(place, placements, infos, "cpu")["path"] for place in places] == ["a", "b"]
    with pytest.raises(ValueError, match=r"node 10\.0\.0\.1"):
        bucket_for(places[1], placements, [{"path": "a"}, None, None, None], "cpu")


def test_a_cuda_replica_reads_the_export_that_rank_zero_merged() -> None:
    placements = ranks(2, 2)
    places = plan_replicas(placements, "cuda", 1)
    infos = [{"rank": 0}, {"rank": 1}, {"rank": 2}, {"rank": 3}]
    assert [bucket_for(place, placements, infos, "cuda") for place in places] == [{"rank": 0}] * 4

"""Whether a cluster can hold a pool, from plain numbers; no Ray runs here."""

import pytest

from verl.single_controller.ray.base import find_free_port
from verl.single_controller.ray.resource_pool import NodeResources, RayResourcePool, check_capacity

CPU_RANK = {"CPU": 0.25}
GPU_RANK = {"CPU": 1.0, "GPU": 1.0}


def test_what_fits_passes():
    check_capacity("train", [8], CPU_RANK, [NodeResources("10.0.0.1", {"CPU": 2.0})])
    check_capacity("train", [20], {"CPU": 0.1}, [NodeResources("10.0.0.1", {"CPU": 2.0})])
    two = [NodeResources("10.0.0.1", {"CPU": 9.0, "GPU": 8.0}), NodeResources("10.0.0.2", {"CPU": 64.0, "GPU": 4.0})]
    check_capacity("train", [4, 8], GPU_RANK, two)
    check_capacity("train", [4, 4, 4], GPU_RANK, two)


@pytest.mark.parametrize(
    ("process_on_nodes", "bundle", "nodes", "have"),
    [
        ([9], CPU_RANK, [{"CPU": 2.0}], "CPU 2, GPU 0"),
        ([1], GPU_RANK, [{"CPU": 2.0}], "CPU 2, GPU 0"),
        ([2], GPU_RANK, [{"CPU": 9.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 1.0}], "node 10.0.0.1: CPU 9, GPU 1"),
        ([1, 1], GPU_RANK, [{"CPU": 9.0, "GPU": 1.0}], "CPU 9, GPU 1"),
        ([1], CPU_RANK, [], "no node"),
    ],
    ids=["too many ranks", "no GPU", "ranks of a node stay together", "too few nodes", "no cluster"],
)
def test_what_does_not_fit_says_what_there_is(process_on_nodes, bundle, nodes, have):
    described = [NodeResources(f"10.0.0.{number}", resources) for number, resources in enumerate(nodes)]
    with pytest.raises(ValueError, match=have) as caught:
        check_capacity("train", process_on_nodes, bundle, described)
    assert f"'train' asks for {process_on_nodes} processes" in str(caught.value)
    assert "trainer.n_gpus_per_node" in str(caught.value)


def test_defaults():
    assert RayResourcePool([2, 2]).bundle == {"CPU": 1.0, "GPU": 1.0}
    pool = RayResourcePool([2, 3], use_gpu=False)
    assert (pool.bundle, pool.world_size) == ({"CPU": 0.25}, 5)
    assert RayResourcePool([1], use_gpu=False, cpus_per_process=2.0).bundle == {"CPU": 2.0}


@pytest.mark.parametrize("process_on_nodes", [[], [0], [2, -1]])
def test_empty_pools_are_refused(process_on_nodes):
    with pytest.raises(ValueError, match="process_on_nodes"):
        RayResourcePool(process_on_nodes)


def test_free_ports_lie_below_those_of_outgoing_connections():
    assert 20000 <= find_free_port() < 32000

"""Whether a cluster can hold pools, from plain numbers; no Ray runs here."""

import re

import pytest

from verl.single_controller.ray.base import find_free_port
from verl.single_controller.ray.resource_pool import NodeResources, RayResourcePool, check_capacity


def cpu(process_on_nodes, name="train", **options):
    return RayResourcePool(process_on_nodes, use_gpu=False, name_prefix=name, **options)


def gpu(process_on_nodes, name="train", **options):
    return RayResourcePool(process_on_nodes, name_prefix=name, **options)


def nodes(*resources):
    return [NodeResources(f"10.0.0.{number}", has) for number, has in enumerate(resources)]


GPUS_8, GPUS_4 = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}


def test_what_fits_passes():
    check_capacity([cpu([8])], nodes({"CPU": 2.0}))
    check_capacity([cpu([20], cpus_per_process=0.1)], nodes({"CPU": 2.0}))
    check_capacity([gpu([4, 8])], nodes({"CPU": 9.0, "GPU": 8.0}, GPUS_4))


@pytest.mark.parametrize(
    ("student", "teacher", "cluster"),
    [
        ([4], [4], [GPUS_8]),
        ([4], [8], [GPUS_8, GPUS_4]),
        ([8], [4], [GPUS_4, GPUS_8]),
        ([6, 6], [2, 2], [GPUS_8, GPUS_8]),
        ([8, 8], [8], [GPUS_8] * 3),
    ],
    ids=["one node", "the larger first", "whichever it is", "beside each other", "a node of its own"],
)
def test_two_pools_that_fit(student, teacher, cluster):
    check_capacity([gpu(student), gpu(teacher, "teacher")], nodes(*cluster))


@pytest.mark.parametrize(
    ("pool", "cluster", "asked", "have"),
    [
        (cpu([9]), [{"CPU": 2.0}], "9 processes of CPU 0.25, GPU 0 on one node", "CPU 2, GPU 0"),
        (gpu([1]), [{"CPU": 2.0}], "1 process of CPU 1, GPU 1 on one node", "CPU 2, GPU 0"),
        (gpu([2]), [{"CPU": 9.0, "GPU": 1.0}] * 2, "2 processes", "node 10.0.0.1: CPU 9, GPU 1"),
        (
            gpu([1, 1]),
            [GPUS_8],
            "1 process of CPU 1, GPU 1 on each of 2 nodes",
            "has node 10.0.0.0: CPU 64, GPU 8. Lower",
        ),
        (gpu([4, 2]), [GPUS_4, {"CPU": 9.0, "GPU": 1.0}], "[4, 2] processes", "GPU 1"),
        (cpu([1]), [], "1 process of", "no node"),
        (gpu([16]), [GPUS_8] * 20, "16 processes", "; and 4 more. Lower"),
    ],
    ids=["too many ranks", "no GPU", "packed", "nodes are machines", "one too small", "no cluster", "many nodes"],
)
def test_what_does_not_fit_says_what_is_asked_for_and_what_there_is(pool, cluster, asked, have):
    with pytest.raises(ValueError, match=re.escape(have)) as caught:
        check_capacity([pool], nodes(*cluster))
    assert f"'train' asks for {asked}" in str(caught.value)
    assert "trainer.n_gpus_per_node" in str(caught.value)


def test_a_pool_that_finds_the_gpus_taken_names_its_own_settings_and_the_other_pool():
    teacher = gpu([8], "teacher", settings="trainer.teacher_n_gpus_per_node")
    with pytest.raises(ValueError, match=r"trainer\.teacher_n_gpus_per_node, or add") as caught:
        check_capacity([gpu([8, 8]), teacher], nodes(GPUS_8, GPUS_8))
    assert "'teacher' asks for 8 processes of CPU 1, GPU 1 on one node, beside 'train' with 8" in str(caught.value)


def test_defaults():
    assert RayResourcePool([2, 2]).rank_share == {"CPU": 1.0, "GPU": 1.0}
    pool = RayResourcePool([2, 3], use_gpu=False)
    assert (pool.rank_share, pool.world_size) == ({"CPU": 0.25}, 5)
    assert RayResourcePool([1], use_gpu=False, cpus_per_process=2.0).rank_share == {"CPU": 2.0}
    for empty in ([], [0], [2, -1]):
        with pytest.raises(ValueError, match="process_on_nodes"):
            RayResourcePool(empty)


def test_free_ports_lie_below_those_of_outgoing_connections():
    assert 20000 <= find_free_port() < 32000

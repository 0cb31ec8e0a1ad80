"""Device settings on a machine without CUDA, or one that is made to look so."""

import pytest
import torch

from verl.utils import device


@pytest.mark.parametrize("has_cuda", [False, True])
def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert device.get_device_name("auto") == ("cuda" if has_cuda else "cpu")
    assert device.get_device_name("cpu") == "cpu"
    if not has_cuda:
        with pytest.raises(ValueError, match=r"trainer\.device='cuda'"):
            device.get_device_name("cuda")


def test_auto_dtype_follows_the_device() -> None:
    assert device.resolve_dtype("auto", "cuda") == torch.bfloat16
    assert device.resolve_dtype("auto", "cpu") == torch.float32
    assert device.resolve_dtype("bf16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="'int8'"):
        device.resolve_dtype("int8", "cpu")


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: set(range(6)))
    try:
        for processes, share in ((2, 3), (4, 1), (8, 1)):
            device.share_cpu_cores(processes)
            assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(threads)


def test_random_numbers_continue_from_a_kept_state() -> None:
    states = device.get_rng_states()
    first = torch.rand(3)
    device.set_rng_states(states)
    assert torch.equal(torch.rand(3), first)

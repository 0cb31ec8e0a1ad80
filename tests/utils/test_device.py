"""Device settings on a machine without CUDA, or one that is made to look so."""

from pathlib import Path

import pytest
import torch

from verl.utils import device


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.get_device_name("auto") == device.get_device_name("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.get_device_name("auto") == device.get_device_name("cuda") == "cuda"
    assert device.get_device_name("cpu") == "cpu"


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"trainer\.device='cuda'"):
        device.get_device_name("cuda")


def test_auto_beside_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "GPU_FILE", tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.device='auto' would train on the CPU beside a GPU .*driver"):
        device.get_device_name("auto")
    assert device.get_device_name("cpu") == device.get_device_name("auto", elsewhere=True) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.get_device_name("auto") == "cpu"


def test_auto_dtype_follows_the_device() -> None:
    assert device.resolve_dtype("auto", "cuda") == torch.bfloat16
    assert device.resolve_dtype("auto", "cpu") == torch.float32
    assert device.resolve_dtype("bf16", "cpu") == device.resolve_dtype("bfloat16", "cuda") == torch.bfloat16
    assert device.dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(ValueError, match="'int8'"):
        device.resolve_dtype("int8", "cpu")


def test_ranks_share_weights_from_memory_that_engines_may_open(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    settings: list[str] = []
    for name, stand_in in {"device_count": lambda: 2, "set_device": lambda _: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    assert device.select_device("cuda", 3) == torch.device("cuda", 1) and settings == []
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    device.select_device("cuda", 0)
    assert settings == ["expandable_segments:False"] and "expandable segments are off" in caplog.text


def test_a_cpu_without_bf16_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_it=has_it: {"avx512_f": True, "amx_bf16": has_it})
        device.warn_of_emulated_bf16.cache_clear()
        device.warn_of_emulated_bf16()
        device.warn_of_emulated_bf16()
        assert caplog.text.count("no bf16 arithmetic") == (not has_it)


def test_the_largest_gpu_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.card_bytes() is None
    tool = tmp_path / "nvidia-smi"
    for answer, expected in (("echo 24564; echo 81559", 81559 * 2**20), ("echo '[N/A]'", None), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
        assert device.card_bytes() == expected

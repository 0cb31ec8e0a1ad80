"""What the processes compute on: CUDA or the CPU.

In:  the setting ``trainer.device`` (``auto``, ``cuda``, ``cpu``). Out: names, dtypes, communication backends and the
few memory calls that differ between the two. No other module looks which device there is.
"""

import os
from types import ModuleType

import torch

DEVICE_SETTINGS = ("auto", "cuda", "cpu")

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}


def is_cuda_available() -> bool:
    """Whether this process sees a CUDA device."""
    return torch.cuda.is_available()


def get_device_name(setting: str = "auto") -> str:
    """``cuda`` or ``cpu``: what ``trainer.device`` means on this machine.

    Raises:
        ValueError: an unknown setting, or ``cuda`` where there is none.
    """
    if setting not in DEVICE_SETTINGS:
        raise ValueError(f"trainer.device={setting!r} is not one of {', '.join(DEVICE_SETTINGS)}")
    if setting == "auto":
        return "cuda" if is_cuda_available() else "cpu"
    if setting == "cuda" and not is_cuda_available():
        raise ValueError("trainer.device='cuda', and no CUDA device is visible here; use trainer.device=cpu or auto")
    return setting


def get_torch_device(device_name: str) -> ModuleType:
    """The torch module of a device: ``torch.cuda`` or ``torch.cpu``."""
    return torch.cuda if device_name == "cuda" else torch.cpu


def select_device(device_name: str, local_rank: int) -> torch.device:
    """Make this process's device the current one and return it.

    A process that sees only its own GPU counts it as number 0, one that sees all of the machine's takes the one with
    its local rank.
    """
    if device_name != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_cpu_cores(processes: int) -> None:
    """Use this process's share of the machine's cores, where ``processes`` like it run.

    With more threads than cores every small operation waits for threads that do not run: two ranks of two threads on
    two cores were up to fifty times slower than two ranks of one.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def get_process_group_backend(device_name: str) -> str:
    """Backend of ``torch.distributed``; with CUDA, tensors on the CPU communicate too (checkpoints need that)."""
    return "cpu:gloo,cuda:nccl" if device_name == "cuda" else "gloo"


def resolve_dtype(setting: str, device_name: str) -> torch.dtype:
    """The dtype of a setting; ``auto`` is bf16 on CUDA and fp32 on the CPU.

    Raises:
        ValueError: no such dtype.
    """
    if setting == "auto":
        return torch.bfloat16 if device_name == "cuda" else torch.float32
    if setting not in _DTYPES:
        raise ValueError(f"dtype {setting!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[setting]


def dtype_name(dtype: torch.dtype) -> str:
    """Name without the module: ``float32``, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def release_cached_memory(device_name: str) -> None:
    """Give memory that the allocator holds unused back to the GPU, where the rollout engine may want it."""
    if device_name == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def synchronize(device_name: str) -> None:
    """Wait for all work queued on the current device."""
    get_torch_device(device_name).synchronize()


def get_device_uuid(device_name: str) -> str:
    """Identity of the current physical GPU, the same in every process that shares it; empty on the CPU."""
    if device_name != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def max_memory_metrics(device_name: str) -> dict[str, float]:
    """Peak memory of this process's GPU in GiB, as metrics; nothing on the CPU."""
    if device_name != "cuda":
        return {}
    return {
        "perf/max_memory_allocated_gb": torch.cuda.max_memory_allocated() / 2**30,
        "perf/max_memory_reserved_gb": torch.cuda.max_memory_reserved() / 2**30,
    }


def get_rng_states() -> dict[str, torch.Tensor]:
    """States of this process's random number generators, by device name."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if is_cuda_available() else states


def set_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Go on from the states of `get_rng_states`; a generator that is not there now is left out."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and is_cuda_available():
        torch.cuda.set_rng_state(states["cuda"])

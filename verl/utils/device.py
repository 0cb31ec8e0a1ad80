"""What the processes compute on: CUDA or the CPU.

In:  the setting ``trainer.device`` (``auto``, ``cuda``, ``cpu``). Out: names, dtypes and the few memory calls that
differ between the two.
"""

import logging
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

GPU_FILE = Path("/dev/nvidia0")
"""There where the system has an NVIDIA GPU, whatever torch makes of it."""
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def get_device_name(setting: str = "auto", elsewhere: bool = False) -> str:
    """``cuda`` or ``cpu``: what ``trainer.device`` means on this machine; ``elsewhere``: it need not have a GPU.

    Raises:
        ValueError: ``cuda`` where there is none, or ``auto`` beside a GPU that torch cannot use.
    """
    has_cuda = torch.cuda.is_available()
    # Hidden on purpose with an empty CUDA_VISIBLE_DEVICES, or of no account.
    is_hidden = elsewhere or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if setting == "auto" and not has_cuda and GPU_FILE.exists() and not is_hidden:
        raise ValueError(
            f"trainer.device='auto' would train on the CPU beside a GPU that torch {torch.__version__} cannot use: run "
            "deploy_env.sh --device cuda, update the driver (CUDA 13 needs 580 or newer; nvidia-smi shows it), or set "
            "trainer.device=cpu"
        )
    if setting == "auto":
        return "cuda" if has_cuda else "cpu"
    if setting == "cuda" and not elsewhere and not has_cuda:
        raise ValueError("trainer.device='cuda', and no CUDA device is visible here; use trainer.device=cpu or auto")
    return setting


def card_bytes() -> int | None:
    """Memory of this machine's largest GPU; None where nothing tells.

    Asked of the driver's own tool: to answer, torch would begin to use a GPU, and take half a GiB of it.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return max((int(word) * 2**20 for word in answer.split() if word.isdigit()), default=None)


def select_device(device_name: str, local_rank: int) -> torch.device:
    """Make this process's device the current one and return it.

    A process that sees only its own GPU counts it as number 0, one that sees all of the machine's takes the one with
    its local rank.
    """
    if device_name != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # cuDNN makes a plan for every row length and batch, at some 30 ms each; flash attention needs none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    asked = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in asked:
        # A container may refuse the engine what it needs to open such memory, in which it would find the weights.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        logger.warning("PYTORCH_CUDA_ALLOC_CONF=%s: expandable segments are off in training ranks", asked)
    return device


def resolve_dtype(setting: str, device_name: str) -> torch.dtype:
    """The dtype of a setting; ``auto`` is bf16 on CUDA and fp32 on the CPU.

    Raises:
        ValueError: no such dtype.
    """
    if setting == "auto":
        return torch.bfloat16 if device_name == "cuda" else torch.float32
    dtype = getattr(torch, _SHORT.get(setting, setting), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {setting!r} is not one of auto, fp32, bf16, fp16")
    return dtype


def cpu_multiplies_in_bf16() -> bool:
    """Whether this CPU has bf16 arithmetic, avx512_bf16 or amx_bf16."""
    return any(has_it for name, has_it in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@cache
def warn_of_emulated_bf16() -> None:
    """Say once that this CPU has no bf16 arithmetic, where it has none."""
    if not cpu_multiplies_in_bf16():
        logger.warning(
            "this CPU has no bf16 arithmetic (avx512_bf16, amx_bf16; see lscpu), so bf16 is slower than fp32 here: "
            "leave actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype at auto"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Name without the module: ``float32``, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def release_cached_memory(device_name: str) -> None:
    """Give memory that the allocator holds unused back to the GPU, where the rollout engine may want it."""
    if device_name == "cuda":
        # First: memory that was shared by CUDA IPC is free only once it is collected.
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def synchronize(device_name: str) -> None:
    """Wait for all work queued on the current device."""
    if device_name == "cuda":
        torch.cuda.synchronize()


def get_device_uuid(device: torch.device) -> str:
    """Identity of the physical GPU, the same in every process that shares it."""
    return str(torch.cuda.get_device_properties(device).uuid)


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
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Go on from the states of `get_rng_states`; a generator that is not there now is left out."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

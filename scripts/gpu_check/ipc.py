"""Weights shared with another process, as ranks share them with engines, and given back."""

from multiprocessing.connection import Connection

import torch
from torch import nn
from torch.multiprocessing import get_context

from scripts.gpu_check.bench import Bench
from verl.utils.device import release_cached_memory, select_device, synchronize
from verl.weight_sync import WeightExporter, bucket_tensors


def digest(tensor: torch.Tensor) -> int:
    """Sum of the bits of a bf16 tensor, exact in any order."""
    return int(tensor.detach().bfloat16().contiguous().view(torch.int16).sum(dtype=torch.int64))


def read_buckets(pipe: Connection, device_name: str) -> None:
    """Another process: reads as an engine does, and keeps the last tensor of a bucket until the next, as vLLM does."""
    device, kept = select_device(device_name, 0), {}
    while (bucket := pipe.recv()) is not None:
        tensors = dict(bucket_tensors(bucket, device))
        found = {name: digest(tensor) for name, tensor in tensors.items()}
        stale = {name: digest(tensor) for name, tensor in kept.items()}
        kept = dict([tensors.popitem()])
        del tensors
        synchronize(device_name)
        pipe.send((found, stale))


def share(bench: Bench, module: nn.Module, bucket_mib: int) -> tuple[dict[str, int], dict[str, int]]:
    """Digests of what the reader found, and of what it kept once the bucket was released."""
    device, found, kept = next(module.parameters()).device, {}, {}
    sizes = {"dtype": torch.bfloat16, "bucket_bytes": bucket_mib << 20}
    exporter, context = WeightExporter(module, device=device, writes_files=True, **sizes), get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=read_buckets, args=(theirs, bench.device), daemon=True)
    reader.start()
    theirs.close()  # so that `recv` ends with the reader
    for index in range(exporter.num_buckets):
        ours.send(exporter.export(index))
        of_bucket, of_kept = ours.recv()
        found, kept = found | of_bucket, kept | of_kept
    ours.send(None)
    reader.join()
    exporter.release()
    return found, kept


def run(bench: Bench) -> None:
    """Buckets so small that a layer spans several, and large ones."""
    device, size = select_device(bench.device, 0), 64 if bench.smoke else 2048
    shapes = {f"layer{number}": (3 * size, size) for number in range(24)} | {"embedding": (bench.sizes[2], size)}
    module = nn.ParameterDict({name: torch.randn(shape, device=device) for name, shape in shapes.items()})
    right = {name: digest(weight) for name, weight in module.items()}
    release_cached_memory(bench.device)
    before = bench.gib("memory_reserved")
    for bucket_mib in (1,) if bench.smoke else (64, 1024):
        label = f"buckets of {bucket_mib} MiB"
        with bench.attempt(label):
            seconds, (found, kept) = bench.timed(lambda mib=bucket_mib: share(bench, module, mib))
            bench.check(f"{label}: seconds", seconds, source="with the start of a process")
            bench.check(f"{label}: as sent", found == right, "== true", "bits are copied")
            stale = [name for name, value in kept.items() if value != right[name]]
            bench.check(f"{label}: kept, and changed", stale, "== []", "torch counts a block's readers")
            release_cached_memory(bench.device)
            left = bench.gib("memory_reserved") - before
            bench.check(f"{label}: GiB left", left, "<= 0.05", "release gives all of it back")

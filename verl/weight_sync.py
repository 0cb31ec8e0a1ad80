"""New weights from the training ranks to the rollout engines, once a step.

::

    send_weights (driver)        all engines: start_weight_update   all ranks: export bucket 0
                                 all engines: load bucket i         all ranks: export bucket i + 1, free bucket i - 1
                                                                    all ranks: free what is left
                                 all engines: finish_weight_update(version); each checks that the whole model came
    WeightExporter (each rank)   gathers the shards of a bucket; shares it with the engines of its machine
    bucket_tensors (engine)      the tensors of a bucket, for ``workers.rollout`` to load; vLLM reads handles itself
    ReceivedWeights (engine)     at the end lists what is missing, unknown, reshaped or sent twice

A bucket has ``names`` and ``shapes`` of its tensors and says where they are. On the CPU: ``path`` of a safetensors file
in shared memory. On CUDA: ``dtype_names`` and ``ipc_handles``, through which an engine on the same GPU reads the
tensors where they lie. For engines apart from the ranks: ``stored``, a handle to the content of such a file in Ray's
object store, which brings it to every node once, where each engine makes a file of it. Every rank exports every bucket,
in order, because each tensor is gathered from all of them. Names are Hugging Face's; a tensor shared by embedding and
head appears once, as the embedding. An adapter is sent as part of the weights that it changes. The driver passes
references to buckets, never weights.

Or (``trainer.rollout_weight_sync=broadcast``) engines apart are in a group with rank 0, a `Channel`: each bucket is
broadcast while engines load it, and they have its names, shapes and ``dtype_names`` before (`broadcast_weights`).
"""

import logging
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from verl.single_controller.base import RolloutError, WorkerError
from verl.single_controller.base.worker import Channel
from verl.utils.device import dtype_name, get_device_uuid, release_cached_memory, synchronize
from verl.utils.durable_files import OwnedFolder, make_owned_folder, remove_abandoned

logger = logging.getLogger(__name__)

DEFAULT_BUCKET_MB = {"cuda": 4096, "cpu": 512}
"""Size of a bucket by device, where ``rollout.weight_sync_bucket_mb`` names none; two are in memory at once."""
GATHER_BYTES = 2**25
"""Most bytes that are gathered in one collective, which takes its time for the smallest tensor too."""
SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "kai-verl-weights-"

Bucket = dict[str, Any]
"""Where to read one bucket; see `WeightExporter.export`."""
WeightShapes = Mapping[str, tuple[int, ...]]
"""Name (Hugging Face's) and shape of every tensor of a model; one that is shared, such as a tied head, once."""

# ------------------------------------------------------------------ sending


def send_weights(
    student: Any, engines: Sequence[Any], ranks_beside: Sequence[Sequence[int]], wait: Callable[..., Any], version: int
) -> None:
    """Send the student's weights to every engine; while these load a bucket, the ranks export the next one.

    Args:
        student: the worker group; its lists have one entry per rank.
        engines: handles of rollout replicas; as with a Ray actor, ``engine.method.remote(...)`` starts a call.
        ranks_beside: per engine the ranks on its GPUs (CUDA) or node (CPU), whose export it reads; all empty: apart.
        wait: ``wait(task, calls, check)`` waits for a call per engine, and calls ``check`` meanwhile.
        version: number of these weights; engines stamp their answers with it.
    """
    export = student.export_weight_bucket if any(ranks_beside) else student.store_weight_bucket
    starts, is_sound = [engine.start_weight_update.remote() for engine in engines], True
    count = len(student.weight_buckets())
    try:
        exports = export(0)
        wait("begin a weight sync", starts, exports.check)
        for index in range(count):
            exported = exports()
            buckets = [bucket_for(ranks or (0,), exported) for ranks in ranks_beside]
            loads = [
                # As an argument of its own a handle becomes its value on the engine's node.
                engine.update_weights.remote(bucket, bucket.pop("stored", None))
                for engine, bucket in zip(engines, buckets, strict=True)
            ]
            if index + 1 < count:
                exports = export(index + 1)
            wait(f"load weight bucket {index} of version {version}", loads, exports.check)
    except WorkerError as error:
        is_sound = isinstance(error, RolloutError)
        raise
    finally:
        # After a failure too: a bucket is GPU memory, or a file in shared memory. Ranks may be stuck in an export then.
        released = student.begin("release_weight_buckets")
        if is_sound:
            released()
    calls = [engine.finish_weight_update.remote(version) for engine in engines]
    wait(f"finish the weight sync of version {version}", calls)


def broadcast_weights(student: Any, engines: Sequence[Any], wait: Callable[..., Any], version: int) -> None:
    """As `send_weights`, to engines that are in a channel with rank 0.

    The ranks are told all buckets at once: they wait for the engines only inside a broadcast. Where an engine fails,
    they wait there until the channel times out, and nobody waits for them.
    """
    starts = [engine.start_weight_update.remote() for engine in engines]
    buckets = student.weight_buckets()
    wait("begin a weight sync", starts)
    sent = [student.store_weight_bucket(index) for index in range(len(buckets))]
    for index, bucket in enumerate(buckets):
        loads = [engine.update_weights.remote(bucket) for engine in engines]
        # A rank that fails leaves the engines in the broadcast until it times out.
        wait(f"load weight bucket {index} of version {version}", loads, sent[index].check)
        sent[index]()
    calls = [engine.finish_weight_update.remote(version) for engine in engines]
    wait(f"finish the weight sync of version {version}", calls)


def bucket_for(ranks: Sequence[int], exports: Sequence[Bucket | None]) -> Bucket:
    """What the engine beside ``ranks`` reads one bucket from: a file in shared memory as it is, or joined handles of
    its own GPUs' memory: all ranks' handles for all engines would grow with the square of the cluster."""
    first, *others = [export for export in (exports[rank] for rank in ranks) if export is not None]
    if "ipc_handles" not in first:
        return dict(first)
    # Per tensor one mapping from a GPU's uuid to its handle, joined over the ranks.
    by_tensor = zip(first["ipc_handles"], *(export["ipc_handles"] for export in others), strict=True)
    return {**first, "ipc_handles": [dict(ChainMap(*of_tensor)) for of_tensor in by_tensor]}


def hugging_face_name(name: str) -> str:
    """The name that a parameter of a `TokenStatsModel` has in the model's own files."""
    return name.removeprefix("causal_lm.").replace(".base_layer.", ".")  # peft's layer holds the one it adapts


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a `TokenStatsModel` under their Hugging Face names, each once; without those of an adapter."""
    return {hugging_face_name(name): weight for name, weight in module.named_parameters() if ".lora_" not in name}


class WeightExporter:
    """Gathers the weights of one model and shares them with engines on this machine, bucket by bucket.

    Args:
        module: the sharded `TokenStatsModel`.
        device: this rank's.
        writes_files: true on one rank of each machine, which writes the files (CPU).
        dtype: the engines' precision.
        bucket_bytes: most bytes of a bucket; a larger tensor is a bucket of its own.
        merge: gives what is sent from a weight's name and its shards; every rank calls it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        writes_files: bool,
        dtype: torch.dtype,
        bucket_bytes: int,
        merge: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, weight: weight,
    ) -> None:
        self._module, self._merge = module, merge
        self._device = device
        self._dtype = dtype
        # Every GPU has an engine beside it, so each rank keeps the bucket; one on several GPUs reads several ranks'.
        on_cpu = self._share_file if writes_files else None
        self._share = self._share_handles if device.type == "cuda" else on_cpu
        self._buckets = _fill_buckets(named_weights(module), dtype.itemsize, bucket_bytes)
        self.num_buckets = len(self._buckets)
        self._exported: dict[int, Callable[[], None]] = {}
        """Buckets in memory, with what frees them."""
        if writes_files:
            remove_abandoned_buckets()

    def export(self, index: int) -> Bucket | None:
        """Gather a bucket and share it; all ranks together.

        Frees all buckets but the one before: when the driver asks for bucket i, the engines have loaded i - 2.

        Returns:
            ``names`` and ``shapes``, with ``path`` on the writing rank of each machine (CPU; None on the others), or
            ``dtype_names`` and ``ipc_handles``, per tensor that of this rank's GPU, on every rank (CUDA).

        Raises:
            RuntimeError: with the bucket's number and what went wrong.
        """
        return self._export(index, self._share)

    def store(self, index: int, to: Callable[[Any], Any] | Channel | None) -> Bucket | None:
        """As ``export``, for engines that share no GPU or machine with the ranks.

        All ranks gather the bucket; rank 0 alone is given ``to``, an object store's ``put`` or a channel, and sends it
        there. From a channel each engine has to receive it meanwhile.
        """

        def share(index: int, tensors: dict[str, torch.Tensor]) -> Bucket:
            assert to is not None
            if isinstance(to, Channel):
                for tensor in tensors.values():
                    to.broadcast(tensor)
                synchronize(self._device.type)
                return {}
            stored = [to(np.frombuffer(save(tensors), dtype=np.uint8))]  # of an array no engine makes a copy
            self._exported[index] = stored.clear
            return {"stored": stored[0]}

        return self._export(index, share if to else None)

    def describe(self) -> list[Bucket]:
        """``names``, ``shapes`` and ``dtype_names`` of each bucket, for those who receive it by a channel."""
        weights, dtype = named_weights(self._module), dtype_name(self._dtype)
        return [
            {"names": names, "shapes": [list(weights[n].shape) for n in names], "dtype_names": [dtype] * len(names)}
            for names in self._buckets
        ]

    def _export(self, index: int, share: Callable[[int, dict[str, torch.Tensor]], Bucket] | None) -> Bucket | None:
        self._free(index - 1)
        try:
            tensors = self._gather(self._buckets[index], keeps=share is not None)
            if share is None:
                return None
            shapes = [list(tensor.shape) for tensor in tensors.values()]
            return {"names": list(tensors), "shapes": shapes, **share(index, tensors)}
        except Exception as error:
            raise RuntimeError(f"weight bucket {index}: {type(error).__name__}: {error}") from error

    def release(self) -> None:
        """Free every bucket, and give its memory back."""
        self._free(self.num_buckets)
        # Not after each bucket: the next would have its memory allocated, and opened by the engines, anew. Torch keeps
        # a shared block until its readers have let go; `ipc_collect` in here looks for such blocks.
        release_cached_memory(self._device.type)

    def _free(self, end: int) -> None:
        for index in [index for index in self._exported if index < end]:
            self._exported.pop(index)()

    def _gather(self, names: Sequence[str], keeps: bool) -> dict[str, torch.Tensor]:
        """Whole tensors by name, where this rank ``keeps`` them."""
        weights = named_weights(self._module)
        tensors: dict[str, torch.Tensor] = {}
        for group in _fill_buckets({name: weights[name] for name in names}, self._dtype.itemsize, GATHER_BYTES):
            # Cast before it is gathered: less travels; on the device, where offloaded weights are cast far faster than
            # in host memory. Gathering needs every rank, those that keep nothing too.
            on_device = {name: weights[name].detach().to(self._device) for name in group}
            shards = [self._merge(name, shard).to(self._dtype) for name, shard in on_device.items()]
            whole = _gather_together(shards)  # contiguous, for safetensors refuses other layouts
            if keeps:
                tensors |= zip(group, whole, strict=True)
        return tensors

    def _share_file(self, index: int, tensors: dict[str, torch.Tensor]) -> Bucket:
        folder = _bucket_folder(sum(tensor.nbytes for tensor in tensors.values()))
        self._exported[index] = folder.remove
        path = str(folder.path / f"bucket-{index}.safetensors")
        save_file(tensors, path)
        return {"path": path}

    def _share_handles(self, index: int, tensors: dict[str, torch.Tensor]) -> Bucket:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = get_device_uuid(self._device)
        # [0] is the function that opens it, `rebuild_cuda_tensor`, and [1] its arguments.
        handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        synchronize("cuda")  # engines may read at once
        self._exported[index] = tensors.clear
        return {"dtype_names": [dtype_name(self._dtype)] * len(tensors), "ipc_handles": handles}


def remove_abandoned_buckets() -> None:
    """Remove what killed runs of this user left, where `_bucket_folder` makes folders."""
    for parent in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        remove_abandoned(parent, FOLDER_PREFIX)


def _bucket_folder(num_bytes: int) -> OwnedFolder:
    """A folder that only this user may read: in shared memory if so much fits, else among temporary files."""
    parent = SHARED_MEMORY
    if not parent.is_dir() or shutil.disk_usage(parent).free < 1.1 * num_bytes:
        parent = Path(tempfile.gettempdir())
        logger.warning("%s is too full for %.0f MiB of weights; using %s", SHARED_MEMORY, num_bytes / 2**20, parent)
    return make_owned_folder(parent, FOLDER_PREFIX)


def _fill_buckets(weights: dict[str, nn.Parameter], itemsize: int, bucket_bytes: int) -> list[list[str]]:
    """Names in the model's order, as many to a bucket as fit."""
    buckets: list[list[str]] = []
    free_bytes = 0
    for name, parameter in weights.items():
        size = parameter.numel() * itemsize
        if not buckets or size > free_bytes:
            buckets.append([])
            free_bytes = bucket_bytes
        buckets[-1].append(name)
        free_bytes -= size  # below 0 after a tensor larger than a bucket
    return buckets


def _gather_together(shards: Sequence[Any]) -> list[torch.Tensor]:
    """Whole tensors, each with memory of its own, from shards as FSDP cuts them, by rows; in one collective."""
    first = shards[0]
    if not isinstance(first, DTensor):
        return [shard.contiguous() for shard in shards]
    if len(shards) == 1:
        return [first.full_tensor().contiguous()]  # without a copy
    along = first.device_mesh.ndim - 1  # any other dimension counts copies
    ranks = first.device_mesh.size(along)
    # Every rank has as many rows but the last ones, which are padded.
    sizes = [-(-len(shard) // ranks) * (shard.numel() // len(shard)) for shard in shards]
    local = [shard.to_local().flatten() for shard in shards]
    mine = torch.cat([F.pad(part, (0, size - len(part))) for part, size in zip(local, sizes, strict=True)])
    gathered = mine.new_empty(ranks * len(mine))
    dist.all_gather_single(gathered, mine, first.device_mesh.get_group(along))
    parts = gathered.view(ranks, -1).split(sizes, dim=1)
    return [
        torch.cat(part.unbind())[: shard.numel()].view(shard.shape) for part, shard in zip(parts, shards, strict=True)
    ]


# ------------------------------------------------------------------ receiving


def weight_shapes(model: torch.nn.Module) -> WeightShapes:
    """What a sync has to bring for this model."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@contextmanager
def as_file(bucket: Mapping[str, Any], content: np.ndarray | None) -> Iterator[Mapping[str, Any]]:
    """A bucket that can be read for the time of the block: with ``content`` (bytes), it names a file that holds it."""
    if content is None:
        yield bucket
        return
    folder = _bucket_folder(content.nbytes)
    try:
        path = folder.path / "bucket.safetensors"
        content.tofile(path)
        yield {**bucket, "path": str(path)}
    finally:
        folder.remove()


def bucket_tensors(
    update_info: Mapping[str, Any], device: torch.device, channel: Channel | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, one at a time, views of memory that belongs to the training ranks, or as they are sent.

    A file is mapped, not read; it may be unlinked once all of them are used.
    """
    if channel is not None:
        facts = zip(update_info["names"], update_info["shapes"], update_info["dtype_names"], strict=True)
        yield from ((name, channel.receive(shape, getattr(torch, dtype))) for name, shape, dtype in facts)
        return
    if "path" in update_info:
        with safe_open(update_info["path"], framework="pt") as bucket:
            yield from ((name, bucket.get_tensor(name)) for name in update_info["names"])
        return
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    uuid = get_device_uuid(device)
    for name, handles in zip(update_info["names"], update_info["ipc_handles"], strict=True):
        arguments = list(handles[uuid])
        # The sender's number of the GPU, which another process may count differently.
        arguments[6] = device.index
        yield name, rebuild_cuda_tensor(*arguments)


class ReceivedWeights:
    """What one sync has brought so far, compared with what the model needs."""

    def __init__(self, expected: WeightShapes) -> None:
        self._expected = expected
        self._received: set[str] = set()
        self._problems: list[str] = []

    def add(self, update_info: Mapping[str, Any]) -> bool:
        """Record a bucket; False if one of its tensors does not fit the model: the bucket must not be loaded."""
        before = len(self._problems)
        for name, shape in zip(update_info["names"], update_info["shapes"], strict=True):
            expected = self._expected.get(name)
            if expected is None:
                self._problems.append(f"unknown: {name}")
            elif expected != tuple(shape):
                self._problems.append(f"reshaped: {name} {list(shape)} instead of {list(expected)}")
            elif name in self._received:
                self._problems.append(f"sent twice: {name}")
            self._received.add(name)
        return len(self._problems) == before

    def problems(self) -> list[str]:
        """Every mismatch, at the end of a sync; empty if the model is complete."""
        missing = self._expected.keys() - self._received
        return [*(f"missing: {name}" for name in sorted(missing)), *self._problems]

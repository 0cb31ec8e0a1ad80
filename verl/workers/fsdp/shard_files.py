"""Tensors of a checkpoint on the disk: every rank's shard, and the whole model made from the shards.

In:  sharded tensors by key. Out, in safetensors, so that reading them never unpickles anything::

    shards/00001-of-00002.safetensors    the shard of rank 0: its slice of every tensor, and where the slice begins
    shards/00002-of-00002.safetensors    the shard of rank 1
    huggingface/model*.safetensors       whole weights under their Hugging Face names

Torch's ``HuggingFaceStorageReader`` reads shards into tensors that are sharded over any number of ranks. Its writer is
not used: it serializes a rank's file in memory, a second copy that holds the interpreter lock while training goes on.
A head that is tied to the embedding has no tensor of its own.
Not here: what is saved and when, the model's config and tokenizer.
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from verl.utils.durable_files import flush, write_durably

Tensors = dict[str, torch.Tensor]
Shard = tuple[Tensors, dict[str, Any]]
"""A rank's slices of tensors, in host memory, and where each begins, as torch's reader expects it."""

SHARDS, HUGGINGFACE = "shards", "huggingface"
OPTIMIZER = "optimizer."
"""Begins the key of every tensor in the shards that is no parameter; parameters have their Hugging Face names."""
MAX_FILE_BYTES = 2 * 10**9
"""Of a file of whole weights, which is in memory at once; a larger tensor is a file of its own."""
WEIGHTS_INDEX = "model.safetensors.index.json"
_FILE_NAME = "{:05d}-of-{:05d}.safetensors"

# Torch warns whenever a rank reads without the others, which is what is wanted here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; when this returns, its content is on the disk."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors renames a file into its place that its owner alone may read
    flush(path)


def copy_shard(tensors: Tensors) -> Shard:
    """Copy this rank's slices. A tensor that is not sharded is the same on all ranks, and rank 0 has it."""
    copies, places = {}, {}
    for key, tensor in tensors.items():
        local, offset = tensor, [0] * tensor.dim()
        if isinstance(tensor, DTensor):
            local, offset = tensor.to_local(), list(tensor.__create_chunk_list__()[0].offsets)
        elif dist.get_rank() > 0:
            continue
        if local.numel() > 0:  # a rank may have no row of a small tensor
            copies[key] = local.to("cpu", copy=True, memory_format=torch.contiguous_format)
            places[key] = {"saved_offsets": offset}
    return copies, places


def write_shard(folder: Path, shard: Shard) -> None:
    """Write this rank's file."""
    copies, places = shard
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE_NAME.format(dist.get_rank() + 1, dist.get_world_size())
    write_file(path, copies, {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})


class ShardReader(dcp.HuggingFaceStorageReader):
    """Reads the shards of any number of ranks; no other rank has to take part.

    Raises:
        ValueError: a shard is missing or damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        # The base class reads what the folder lists: without a shard, tensors would lose their last rows unnoticed.
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names or names != [_FILE_NAME.format(number + 1, len(names)) for number in range(len(names))]:
            raise ValueError(f"{folder} holds no whole set of shards ({names}); take another checkpoint")
        try:
            self._metadata = super().read_metadata()
        except SafetensorError as error:
            raise ValueError(f"{folder} cannot be read ({error}); take an earlier checkpoint") from error
        self.tensors = cast("dict[str, TensorStorageMetadata]", self._metadata.state_dict_metadata)
        """Shape and dtype of every whole tensor, by key."""

    def read_metadata(self) -> Metadata:
        """As the base class does, with the files' headers read once."""
        return self._metadata

    def read(self, tensors: Tensors) -> None:
        """Fill tensors, whole or sharded, with what the shards have under their keys, in their own precision.

        Raises:
            ValueError: a shard cannot be read.
        """
        try:
            dcp.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:  # a BaseException, which callers and Ray would let through
            [(cause, _)] = error.failures.values()
            raise ValueError(f"{self.folder} cannot be read ({cause}); take an earlier checkpoint") from error


def write_weights(shards: Path, folder: Path, dtype: torch.dtype | None = None) -> int:
    """Write the model in ``shards`` as transformers and vLLM load it, with an index where it takes several files.

    Args:
        dtype: precision to write; None: as stored.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the shards are missing or damaged, or hold no model.
        OSError: the weights cannot be written.
    """
    reader = ShardReader(shards)
    weights = {
        name: torch.empty(entry.size, dtype=dtype or entry.properties.dtype, device="meta")
        for name, entry in reader.tensors.items()
        if not name.startswith(OPTIMIZER)
    }
    if not weights:
        raise ValueError(f"{shards} holds no model; it was saved without 'model' in actor.checkpoint.save_contents")
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=MAX_FILE_BYTES)
    for file, names in split.filename_to_tensors.items():
        part = {name: torch.empty_like(weights[name], device="cpu") for name in names}
        reader.read(part)
        write_file(folder / file, part, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_durably(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")
    return sum(weight.numel() for weight in weights.values())

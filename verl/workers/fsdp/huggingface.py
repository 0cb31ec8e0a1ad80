"""A student as a Hugging Face model, from the shards of its checkpoint.

In:  ``shards/`` as ``fsdp.checkpoint`` writes them, for any number of ranks. Out: a folder that transformers and vLLM
load: weights in safetensors, config, generation config, tokenizer. One tensor is in memory at a time, and no other rank
is needed: the shards are read as files.

A head that is tied to the embedding has no tensor of its own here and gets none there; the config says that it is tied.
Not here: which checkpoint, the command line (``verl.model_merger``).
"""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.utils.device import dtype_name
from verl.utils.durable_files import write_durably
from verl.utils.safetensors_stream import TensorInfo, write_safetensors
from verl.workers.fsdp.shard_files import read_shards, stored_tensors

MODEL_PREFIX = "model."
"""What parameters are called in the shards, before their Hugging Face names."""
MAX_FILE_BYTES = 5 * 10**9
WEIGHTS_INDEX = "model.safetensors.index.json"

# Said of every read without the other ranks, which is what is wanted here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class ModelDescription(NamedTuple):
    """All of a model but its weights."""

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "ModelDescription":
        """The description of a model as it is now; later changes of the model do not reach it."""
        config = copy.deepcopy(causal_lm.config)
        config.architectures = [type(causal_lm).__name__]
        config.dtype = dtype_name(next(causal_lm.parameters()).dtype)
        return cls(config, copy.deepcopy(causal_lm.generation_config), tokenizer)

    def write(self, folder: Path) -> None:
        """Write config, generation config and tokenizer in Hugging Face format."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def stored_weights(shards: Path) -> list[TensorInfo]:
    """The model's parameters in ``shards/``, under their Hugging Face names.

    Raises:
        ValueError: the shards are not there or hold no model.
    """
    infos = [
        TensorInfo(key.removeprefix(MODEL_PREFIX), entry.properties.dtype, tuple(entry.size))
        for key, entry in stored_tensors(shards).items()
        if key.startswith(MODEL_PREFIX)
    ]
    if not infos:
        raise ValueError(f"{shards} holds no model; it was saved without 'model' in actor.checkpoint.save_contents")
    return infos


def write_weights(
    shards: Path, folder: Path, dtype: torch.dtype | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> list[TensorInfo]:
    """Write the weights of ``shards/`` as safetensors, with an index where they take more than one file.

    Args:
        dtype: precision to write; None: as stored.
        max_file_bytes: most bytes of a file; a larger tensor is a file of its own.

    Returns:
        What was written.

    Raises:
        ValueError: the shards are not there, cannot be read, or hold no model.
        OSError: no room, or no right to write.
    """

    def read(info: TensorInfo) -> torch.Tensor:
        whole = {MODEL_PREFIX + info.name: torch.empty(info.shape, dtype=stored[info.name])}
        read_shards(whole, shards, no_dist=True)
        return whole[MODEL_PREFIX + info.name].to(info.dtype)

    infos = stored_weights(shards)
    stored = {info.name: info.dtype for info in infos}
    if dtype is not None:
        infos = [info._replace(dtype=dtype) for info in infos]
    folder.mkdir(parents=True, exist_ok=True)
    files = _split(infos, max_file_bytes)
    for name, part in files.items():
        write_safetensors(folder / name, part, read)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in infos)},
            "weight_map": {info.name: name for name, part in files.items() for info in part},
        }
        write_durably(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")
    return infos


def _split(infos: Sequence[TensorInfo], max_file_bytes: int) -> dict[str, list[TensorInfo]]:
    """Tensors by file, in order, as many to a file as fit."""
    parts: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not parts or info.num_bytes > room:
            parts.append([])
            room = max_file_bytes
        parts[-1].append(info)
        room -= info.num_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}

"""Checkpoints of a trained, sharded model.

In:  model, optimizer, its steps and a folder. Out, below that folder, in safetensors, which unpickle nothing::

    shards/00001-of-00002.safetensors    rank 0's slice of every parameter and of AdamW's state, and where it begins
    shards/00002-of-00002.safetensors    the same of rank 1
    extra_rank_<r>.safetensors           optimizer steps done, training step, random number generators of rank r
    huggingface/                         config and tokenizer, and with ``hf_model`` the weights, for transformers, vLLM
    adapter/                             of a student that has one: the adapter in peft's files

`actor.checkpoint` says which of these are written and read. All ranks call `begin` together::

    begin: copy to host memory ──► training goes on
                 └─► a thread: write extra and shard ──► when all ranks have: rank 0 makes huggingface/ ──► outcome

What training changes after `begin` returned does not reach the checkpoint. The copy takes as much host memory as the
rank's parameters and optimizer state until it is written.

Torch's ``HuggingFaceStorageReader`` reads shards into tensors that are sharded over any number of ranks. Its writer is
not used: it serializes a rank's file in memory, a second copy that holds the interpreter lock while training goes on.
A head that is tied to the embedding has no tensor of its own. The weights beside an adapter never change: ``shards``
have the adapter alone, and ``huggingface`` the two merged, of shards that are written for this and removed.
Not here: which checkpoint is the newest, how many stay, whether one is whole, the position in the data.
"""

import copy
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from verl.config import CheckpointConfig
from verl.utils.device import dtype_name, get_rng_states, set_rng_states
from verl.utils.durable_files import flush, flush_tree, write_durably
from verl.utils.tokenizer import save_tokenizer
from verl.workers.fsdp.adapter import ADAPTER, FILE_PREFIX, adapted_layers, merged_weights
from verl.workers.fsdp.training_state import OPTIMIZER, TrainingState, follow, named_averages, named_tensors

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Shard = tuple[Tensors, dict[str, Any]]
"""A rank's slices of tensors, in host memory, and where each begins, as torch's reader expects it."""

SHARDS, HUGGINGFACE, EXTRA, CONFIG = "shards", "huggingface", "extra_rank_{}.safetensors", "config.json"
ADAPTER_FOLDER, MERGED = "adapter", "merged_shards"
MAX_FILE_BYTES = 2 * 10**9
"""Most bytes of a file of whole weights, which is in memory at once; a larger tensor is a file of its own."""
WRITE_TIMEOUT = timedelta(hours=2)
"""How long a rank that has written waits for the slowest."""
_SHARD_NAME = "{:05d}-of-{:05d}.safetensors"

# Torch warns whenever a rank reads without the others, which is what is wanted here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# ------------------------------------------------------------------ tensors on the disk


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; when this returns, its content is on the disk."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors renames a file into its place that its owner alone may read
    flush(path)


def copy_shard(tensors: Iterable[tuple[str, torch.Tensor]]) -> Shard:
    """Copy this rank's slices; where several ranks hold the same slice or tensor, only the first of them copies it."""
    copies, places = {}, {}
    for key, tensor in tensors:
        local, offset = tensor, [0] * tensor.dim()
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            if mesh.ndim > 1 and mesh.get_local_rank(0) > 0:
                continue
            # What torch itself asks for a checkpoint: where this shard begins, uneven ones included.
            local, offset = tensor.to_local(), list(tensor.__create_chunk_list__()[0].offsets)
        elif dist.get_rank() > 0:
            continue
        if local.numel() > 0:  # a rank may have no row of a small tensor
            # On the CPU, `to` alone would give memory that training goes on to change.
            copies[key] = local.to("cpu", copy=True, memory_format=torch.contiguous_format)
            places[key] = {"saved_offsets": offset}
    return copies, places


def write_shard(folder: Path, shard: Shard) -> None:
    """Write this rank's file."""
    copies, places = shard
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SHARD_NAME.format(dist.get_rank() + 1, dist.get_world_size())
    # Without this entry the reader takes every slice to begin at 0.
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
        if not names or names != [_SHARD_NAME.format(number + 1, len(names)) for number in range(len(names))]:
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
            ValueError: a shard cannot be read, or lacks a tensor or has it in another shape.
        """
        try:
            dcp.load(tensors, storage_reader=self, no_dist=True)
        except CheckpointException as error:  # a BaseException, which callers and Ray would let through
            [(cause, _)] = error.failures.values()
            raise ValueError(f"{self.folder} cannot be loaded ({cause}); take a whole one of this model") from error


def _to_own_files(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Tensors under the names and in the shapes of the model's own files, from those of its module.

    Transformers stacks experts in memory; other programs, and other versions of it, know them one by one.
    """
    if "auto_map" in config:  # a folder's own code, whatever model of transformers it is called after
        return tensors
    kinds = config["architectures"][0], config["model_type"]
    found = next(filter(None, map(get_checkpoint_conversion_mapping, kinds)), ())
    conversions = [each for each in found if not isinstance(each, PrefixChange)]  # from models of more than text
    # What is joined from several tensors may lie in several files.
    if not conversions or any(len(each.target_patterns) > 1 for each in conversions):
        return tensors
    model: Any = SimpleNamespace(_weight_conversions=conversions, config=None)  # all that is asked of a model
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}


def write_weights(shards: Path, folder: Path, described: Path, dtype: torch.dtype | None = None) -> int:
    """Write the model in ``shards`` as transformers and vLLM load it, with an index where it takes several files.

    Args:
        described: folder of its config.json.
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
        if not name.startswith((OPTIMIZER, FILE_PREFIX))
    }
    if not weights:
        raise ValueError(f"{shards} holds no model; it was saved without 'model' in actor.checkpoint.save_contents")
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=MAX_FILE_BYTES)
    config = json.loads((described / CONFIG).read_text(encoding="utf-8"))
    files: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        part = {name: torch.empty_like(weights[name], device="cpu") for name in names}
        reader.read(part)
        part = _to_own_files(part, config)
        files |= dict.fromkeys(part, file)
        write_file(folder / file, part, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": files}
        write_durably(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return sum(weight.numel() for weight in weights.values())


def write_adapter(shards: Path, folder: Path, config: Any) -> None:
    """Write what ``shards`` hold of a model, the adapter and perhaps embedding and head, as peft loads it.

    Args:
        config: peft's; it names the model to load that beside.
    """
    reader = ShardReader(shards)
    found = {name: entry.size for name, entry in reader.tensors.items() if not name.startswith(OPTIMIZER)}
    adapter = {name: torch.empty(size) for name, size in found.items()}
    reader.read(adapter)
    config.save_pretrained(folder)
    named = {FILE_PREFIX + name.removeprefix(FILE_PREFIX): value for name, value in adapter.items()}
    write_file(folder / "adapter_model.safetensors", named, {"format": "pt"})


# ------------------------------------------------------------------ writing a checkpoint


class SaveOutcome(NamedTuple):
    """How far one rank's part of a checkpoint is."""

    done: bool
    """False while the rank still writes."""
    error: str = ""
    """Why nothing usable was written; empty where all went well, and while the rank writes."""
    seconds: float = 0.0
    """From the start of the copy to the last byte, where all went well."""


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own. All ranks make one together.

    Args:
        config: what a checkpoint holds.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._contents = set(config.save_contents)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # Not the training's own group: two threads of a rank must not mix their messages.
        self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self._writing: Future[SaveOutcome] | None = None

    def begin(self, state: TrainingState, folder: Path, global_step: int, optimizer_steps: int) -> None:
        """Copy the state and start to write it; waits for a checkpoint that is still being written."""
        self.outcome(wait=True)
        began = time.perf_counter()
        # The weights of huggingface/ are made from the shards.
        contents = self._contents | ({"model"} if "hf_model" in self._contents else set())
        own = named_tensors(state, contents) | (named_averages(state) if "model" in contents else {})
        copies = {SHARDS: copy_shard(own.items())} if own else {}
        if "hf_model" in contents and adapted_layers(state.module):
            copies[MERGED] = copy_shard(merged_weights(state.module))
        extra: Tensors = {}
        if "extra" in contents:
            extra = {"global_step": torch.tensor(global_step), "optimizer_steps": torch.tensor(optimizer_steps)}
            extra |= {f"rng.{device}": generator for device, generator in get_rng_states().items()}
        dtype = dtype_name(next(state.module.causal_lm.parameters()).dtype)  # the next forward pass has others
        self._writing = self._thread.submit(self._save, state, dtype, copies, extra, folder, began)

    def outcome(self, wait: bool) -> SaveOutcome:
        """Progress of the checkpoint that began last; done, without an error, where none did.

        Args:
            wait: until it is written.
        """
        if self._writing is None:
            return SaveOutcome(done=True)
        if not wait and not self._writing.done():
            return SaveOutcome(done=False)
        return self._writing.result()

    def _save(self, *what: Any) -> SaveOutcome:
        # An error that is kept would keep the copies too, which its traceback holds.
        try:
            return SaveOutcome(done=True, seconds=self._write(*what))
        except Exception as error:
            return SaveOutcome(done=True, error=f"{type(error).__name__}: {error}".splitlines()[0])

    def _write(
        self, state: TrainingState, dtype: str, copies: dict[str, Shard], extra: Tensors, folder: Path, began: float
    ) -> float:
        """Write, in the thread, and return the seconds since ``began``. ``state`` gives config and tokenizer alone."""
        rank, shards, huggingface = dist.get_rank(), folder / SHARDS, folder / HUGGINGFACE
        for name in (SHARDS, MERGED) if rank == 0 else ():
            shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier save, perhaps by more ranks
        dist.barrier(self._group)  # nobody writes before the old files are gone
        failed = torch.ones(1)  # stays so where anything below raises
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if extra:
                write_file(folder / EXTRA.format(rank), extra)
            for name, shard in copies.items():
                write_shard(folder / name, shard)
            failed.zero_()
        finally:
            # Whatever happened: the other ranks wait here.
            dist.all_reduce(failed, group=self._group)
        # Nothing is made of a set that is not whole; the rank that failed reports why.
        if rank == 0 and not failed and {"model", "hf_model"} & self._contents:
            causal_lm = state.module.causal_lm
            _write_description(causal_lm, dtype, state.tokenizer, huggingface)
            if "hf_model" in self._contents:
                write_weights(folder / (MERGED if MERGED in copies else SHARDS), huggingface, huggingface)
            if adapted_layers(causal_lm):
                write_adapter(shards, folder / ADAPTER_FOLDER, causal_lm.peft_config[ADAPTER])
                flush_tree(folder / ADAPTER_FOLDER)
            shutil.rmtree(folder / MERGED, ignore_errors=True)
            if not {"model", "optimizer"} & self._contents:
                shutil.rmtree(shards)  # they were for the export alone
            flush_tree(huggingface)
        return time.perf_counter() - began


def _write_description(
    causal_lm: PreTrainedModel, dtype: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write all of a Hugging Face model but its weights, which are stored in ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(causal_lm.config)
    config.architectures = [type(causal_lm).__name__]
    config.dtype = dtype
    if type(causal_lm)._auto_class is not None:
        custom_object_save(causal_lm, folder, config=config)  # the model's own code, beside that of its config
    config.save_pretrained(folder)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rope = values.get("rope_parameters") or {}
    if "rope_type" in rope:
        # Where transformers 4 looks, which else takes another base without a word.
        values |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope["rope_type"] != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        write_durably(folder / CONFIG, json.dumps(values, indent=2) + "\n")
    if causal_lm.generation_config is not None:
        # save_pretrained refuses what many models have, such as a temperature beside do_sample=false.
        causal_lm.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    save_tokenizer(tokenizer, folder)


# ------------------------------------------------------------------ reading


def load_checkpoint(state: TrainingState, config: CheckpointConfig, folder: Path) -> int | None:
    """Read the parts that ``config.load_contents`` names, on as many ranks as there are now. Models that follow this
    one, of which the files have none, begin anew at its weights.

    Returns:
        Optimizer steps that were done; None where ``extra`` is not among the parts.

    Raises:
        ValueError: a part is missing, cannot be read, or belongs to another model.
    """
    if tensors := named_tensors(state, config.load_contents):
        reader, averages = ShardReader(folder / SHARDS), named_averages(state)
        reader.read(tensors)
        for average in state.averages.values():
            follow(average, state.module, 0.0)
        if found := averages.keys() & reader.tensors.keys() if "model" in config.load_contents else ():
            reader.read({key: averages[key] for key in found})
    if "extra" not in config.load_contents:
        return None
    own = folder / EXTRA.format(dist.get_rank())
    path = own if own.is_file() else folder / EXTRA.format(0)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; leave 'extra' out of actor.checkpoint.load_contents")
    extra = load_file(path)
    if path == own:
        set_rng_states({key.removeprefix("rng."): value for key, value in extra.items() if key.startswith("rng.")})
    else:
        logger.warning("%s has no random state of rank %d; it goes on with its own", folder, dist.get_rank())
    return int(extra["optimizer_steps"])

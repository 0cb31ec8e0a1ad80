"""Checkpoints of a trained, sharded model.

In:  model, optimizer, schedule and a folder. Out, below that folder::

    shards/                       parameters and AdamW state, each rank its part; readable by any number of ranks
    extra_rank_<r>.safetensors    optimizer steps done, training step, random number generators of rank r
    huggingface/                  config and tokenizer, and with ``hf_model`` the weights, for transformers and vLLM

`actor.checkpoint` says which of these are written and read. All ranks call `begin` together::

    begin: copy to host memory ──► training goes on
                 └─► a thread: write extra and shard ──► when all ranks have: rank 0 makes huggingface/ ──► outcome

What training changes after `begin` returned does not reach the checkpoint. The copy takes as much host memory as the
rank's parameters and optimizer state until it is written.
Not here: which checkpoint is the newest, how many stay, whether one is whole, the position in the data.
"""

import copy
import logging
import shutil
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl.config import CheckpointConfig
from verl.utils.device import dtype_name, get_rng_states, set_rng_states
from verl.utils.durable_files import flush_tree
from verl.weight_sync.send import named_weights
from verl.workers.fsdp import shard_files
from verl.workers.fsdp.optimizer import LearningRateSchedule
from verl.workers.fsdp.shard_files import HUGGINGFACE, OPTIMIZER, SHARDS, ShardReader, Tensors
from verl.workers.fsdp.token_stats_model import TokenStatsModel

logger = logging.getLogger(__name__)

EXTRA = "extra_rank_{}.safetensors"
WRITE_TIMEOUT = timedelta(hours=2)
"""How long a rank that has written waits for the slowest."""
SHOWN_DIFFERENCES = 10


class SaveOutcome(NamedTuple):
    """How far one rank's part of a checkpoint is."""

    done: bool
    """False while the rank still writes."""
    error: str = ""
    """Why nothing usable was written; empty where all went well, and while the rank writes."""
    seconds: float = 0.0
    """From the start of the copy to the last byte, where all went well."""


class TrainingState(NamedTuple):
    """What a checkpoint is taken of."""

    module: TokenStatsModel
    optimizer: torch.optim.Optimizer
    schedule: LearningRateSchedule
    tokenizer: PreTrainedTokenizerBase


def _named_tensors(state: TrainingState, contents: Collection[str]) -> Tensors:
    """The model's and the optimizer's own tensors by key: loading into them loads into the training state.

    Without ``get_state_dict`` of torch: it adds settings of the optimizer, which only a pickle could hold.
    """
    tensors: Tensors = {}
    for name, parameter in named_weights(state.module).items():
        if "model" in contents:
            tensors[name] = parameter.detach()
        if "optimizer" in contents:
            moments = state.optimizer.state[parameter]
            tensors |= {f"{OPTIMIZER}{key}.{name}": value for key, value in moments.items()}
    return tensors


# ------------------------------------------------------------------ writing


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
        self._writing: Future[float] | None = None

    def begin(self, state: TrainingState, folder: Path, global_step: int) -> None:
        """Copy the state and start to write it; waits for a checkpoint that is still being written."""
        self.outcome(wait=True)
        began = time.perf_counter()
        # The weights of huggingface/ are made from the shards.
        contents = self._contents | ({"model"} if "hf_model" in self._contents else set())
        shard = shard_files.copy_shard(_named_tensors(state, contents))
        extra: Tensors = {}
        if "extra" in contents:
            extra = {"global_step": torch.tensor(global_step), "optimizer_steps": torch.tensor(state.schedule.steps)}
            extra |= {f"rng.{device}": generator for device, generator in get_rng_states().items()}
        self._writing = self._thread.submit(self._write, state, shard, extra, folder, began)

    def outcome(self, wait: bool) -> SaveOutcome:
        """How far the checkpoint is that was begun last; done, without an error, where there is none.

        Args:
            wait: until it is written.
        """
        if self._writing is None:
            return SaveOutcome(done=True)
        if not wait and not self._writing.done():
            return SaveOutcome(done=False)
        writing, self._writing = self._writing, None
        error = writing.exception()
        if error is not None:
            return SaveOutcome(done=True, error=f"{type(error).__name__}: {error}".splitlines()[0])
        return SaveOutcome(done=True, seconds=writing.result())

    def _write(
        self, state: TrainingState, shard: shard_files.Shard, extra: Tensors, folder: Path, began: float
    ) -> float:
        """Write, in the thread, and return the seconds since ``began``. ``state`` gives config and tokenizer alone."""
        rank, shards, huggingface = dist.get_rank(), folder / SHARDS, folder / HUGGINGFACE
        if rank == 0:
            shutil.rmtree(shards, ignore_errors=True)  # of an earlier save, perhaps by more ranks
        dist.barrier(self._group)
        failed = torch.ones(1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if extra:
                shard_files.write_file(folder / EXTRA.format(rank), extra)
            if self._contents - {"extra"}:
                shard_files.write_shard(shards, shard)
            failed.zero_()
        finally:
            # Whatever happened: the other ranks wait here.
            dist.all_reduce(failed, group=self._group)
        if rank == 0 and not failed and {"model", "hf_model"} & self._contents:
            _write_description(state.module.causal_lm, state.tokenizer, huggingface)
            if "hf_model" in self._contents:
                shard_files.write_weights(shards, huggingface)
            if not {"model", "optimizer"} & self._contents:
                shutil.rmtree(shards)
            flush_tree(huggingface)
        return time.perf_counter() - began


def _write_description(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all of a Hugging Face model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(causal_lm.config)
    config.architectures = [type(causal_lm).__name__]
    config.dtype = dtype_name(next(causal_lm.parameters()).dtype)
    config.save_pretrained(folder)
    if causal_lm.generation_config is not None:
        causal_lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------ reading


def load_checkpoint(state: TrainingState, config: CheckpointConfig, folder: Path) -> None:
    """Read the parts that ``config.load_contents`` names, on as many ranks as there are now.

    Raises:
        ValueError: a part is missing, cannot be read, or belongs to another model.
    """
    tensors = _named_tensors(state, config.load_contents)
    if tensors:
        reader = ShardReader(folder / SHARDS)
        saved = {key: list(entry.size) for key, entry in reader.tensors.items()}
        wrong = [
            f"- {key}: {saved.get(key, 'nothing')} there, {list(tensor.shape)} here"
            for key, tensor in tensors.items()
            if saved.get(key) != list(tensor.shape)
        ]
        if wrong:
            raise ValueError(
                f"{reader.folder} is of another model than actor_rollout_ref.model.path; choose another checkpoint or "
                "set trainer.resume_mode=disable:\n" + "\n".join(wrong[:SHOWN_DIFFERENCES])
            )
        reader.read(tensors)
    if "extra" not in config.load_contents:
        return
    own = folder / EXTRA.format(dist.get_rank())
    path = own if own.is_file() else folder / EXTRA.format(0)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; leave 'extra' out of actor.checkpoint.load_contents")
    extra = load_file(path)
    state.schedule.set_steps(int(extra["optimizer_steps"]))
    if path == own:
        set_rng_states({key.removeprefix("rng."): value for key, value in extra.items() if key.startswith("rng.")})
    else:
        logger.warning("%s has no random state of rank %d; it goes on with its own", folder, dist.get_rank())

"""Checkpoints of a trained, sharded model.

In:  model, optimizer, schedule and a folder. Out, below that folder::

    shards/              parameters and AdamW state, each rank its part; readable by any number of ranks
    extra_rank_<r>.pt    optimizer steps done, training step, random number generators of rank r
    huggingface/         config and tokenizer, and with ``hf_model`` the weights: a model for transformers and vLLM

`actor.checkpoint` says which of these are written and read. All ranks call `begin` and `load_checkpoint` together::

    begin: copy to host memory ──► training goes on
                 └─► a thread: write extra, write shards (ranks agree over a gloo group of the threads' own),
                               rank 0 makes huggingface/ from the shards ──► outcome

What training changes after `begin` returned does not reach the checkpoint. The copy takes as much host memory as the
rank's parameters and optimizer state until it is written.
Not here: which checkpoint is the newest, how many stay, whether one is whole, the position in the data.
"""

import io
import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from verl.config import CheckpointConfig
from verl.utils.device import get_rng_states, set_rng_states
from verl.utils.durable_files import write_durably
from verl.utils.save_outcome import SaveOutcome
from verl.weight_sync.send import named_weights
from verl.workers.fsdp.huggingface import MODEL_PREFIX, ModelDescription, write_weights
from verl.workers.fsdp.optimizer import LearningRateSchedule
from verl.workers.fsdp.shard_files import ShardWriter, cause_of, read_shards, stored_tensors
from verl.workers.fsdp.token_stats_model import TokenStatsModel

logger = logging.getLogger(__name__)

SHARDS = "shards"
HUGGINGFACE = "huggingface"
OPTIMIZER_PREFIX = "optimizer."
WRITE_TIMEOUT = timedelta(hours=2)
"""How long a rank that has written waits for the slowest."""
SHOWN_DIFFERENCES = 10


class TrainingState(NamedTuple):
    """What a checkpoint is taken of."""

    module: TokenStatsModel
    optimizer: torch.optim.Optimizer
    schedule: LearningRateSchedule
    tokenizer: PreTrainedTokenizerBase


def _sharded_state(state: TrainingState, contents: list[str]) -> dict[str, torch.Tensor]:
    """Tensors by key, the model's and the optimizer's own: loading into them loads into the training state."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named_weights(state.module).items():
        if "model" in contents:
            tensors[MODEL_PREFIX + name] = parameter.detach()
        if "optimizer" in contents:
            moments = state.optimizer.state[parameter]
            tensors |= {f"{OPTIMIZER_PREFIX}{key}.{name}": value for key, value in moments.items()}
    return tensors


# ------------------------------------------------------------------ writing


class Snapshot(NamedTuple):
    """A rank's part of a checkpoint, in host memory and independent of the training state."""

    tensors: dict[str, torch.Tensor]
    extra: bytes | None
    description: ModelDescription | None
    """On rank 0, where a model is written."""
    exports: bool
    """Whether ``huggingface/`` gets weights."""
    keeps_model: bool
    """Whether the shards stay once the weights are exported."""

    @classmethod
    def take(cls, state: TrainingState, contents: list[str], global_step: int) -> "Snapshot":
        """Copy what ``contents`` names. Weights for ``huggingface/`` come from the shards, so these are copied too."""
        exports = "hf_model" in contents
        wanted = [*contents, "model"] if exports else contents
        describes = "model" in wanted and dist.get_rank() == 0
        return cls(
            tensors=_copied_to_host(_sharded_state(state, wanted)),
            extra=_extra(state, global_step) if "extra" in contents else None,
            description=ModelDescription.of(state.module.causal_lm, state.tokenizer) if describes else None,
            exports=exports,
            keeps_model="model" in contents or "optimizer" in contents,
        )

    def write(self, folder: Path, group: dist.ProcessGroup) -> None:
        """Write it below ``folder``; all ranks of ``group`` together.

        Raises:
            OSError: no room, or no right to write.
            CheckpointException: some rank could not write its shards; every rank raises it.
        """
        own_failure: OSError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.extra is not None:
                write_durably(folder / f"extra_rank_{dist.get_rank()}.pt", self.extra)
        except OSError as error:
            own_failure = error  # raised after the others have had this rank's part in what they do together
        if self.tensors:
            dcp.save(self.tensors, storage_writer=ShardWriter(folder / SHARDS), process_group=group)
        if own_failure is not None:
            raise own_failure
        if self.description is not None:
            self.description.write(folder / HUGGINGFACE)
            if self.exports:
                write_weights(folder / SHARDS, folder / HUGGINGFACE)
            if not self.keeps_model:
                shutil.rmtree(folder / SHARDS)


def _copied_to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, sharded as the originals are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            shard = tensor.to_local().to("cpu", copy=True)
            copies[key] = DTensor.from_local(
                shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        else:
            copies[key] = tensor.to("cpu", copy=True)
    return copies


def _extra(state: TrainingState, global_step: int) -> bytes:
    content = io.BytesIO()
    extra = {"global_step": global_step, "optimizer_steps": state.schedule.steps, "rng": get_rng_states()}
    torch.save(extra, content)
    return content.getvalue()


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own.

    Args:
        config: what a checkpoint holds.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._contents = config.save_contents
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[float] | None = None

    def begin(self, state: TrainingState, folder: Path, global_step: int) -> None:
        """Copy the state and start to write it; waits for a checkpoint that is still being written."""
        self.outcome(wait=True)
        if self._group is None:
            # Not the training's own group: two threads of a rank must not mix their messages.
            self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        began = time.perf_counter()
        snapshot = Snapshot.take(state, self._contents, global_step)
        self._writing = self._thread.submit(_write, snapshot, folder, self._group, began)

    def outcome(self, wait: bool) -> SaveOutcome:
        """How the checkpoint that was begun last is doing; done, without an error, where there is none.

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
            return SaveOutcome(done=True, error=cause_of(error))
        return SaveOutcome(done=True, seconds=writing.result())


def _write(snapshot: Snapshot, folder: Path, group: dist.ProcessGroup, began: float) -> float:
    snapshot.write(folder, group)
    return time.perf_counter() - began


# ------------------------------------------------------------------ reading


def load_checkpoint(state: TrainingState, config: CheckpointConfig, folder: Path) -> None:
    """Read the parts that ``config.load_contents`` names, on as many ranks as there are now.

    Raises:
        ValueError: a part is not there, cannot be read, or belongs to another model.
    """
    tensors = _sharded_state(state, config.load_contents)
    if tensors:
        _require_same_tensors(tensors, folder / SHARDS)
        read_shards(tensors, folder / SHARDS)
    if "extra" in config.load_contents:
        _load_extra(state, folder)
    dist.barrier()


def _require_same_tensors(tensors: dict[str, torch.Tensor], shards: Path) -> None:
    """Hold the shards to this model's tensors, by name and shape.

    Raises:
        ValueError: the shards hold other tensors than this model has; the message lists them.
    """
    saved = {key: list(entry.size) for key, entry in stored_tensors(shards).items()}
    own = {key: list(tensor.shape) for key, tensor in tensors.items()}
    kinds = {key.partition(".")[0] for key in own}
    saved = {key: shape for key, shape in saved.items() if key.partition(".")[0] in kinds}
    if saved == own:
        return
    wrong = [
        f"{key}: {saved.get(key, 'nothing')} there, {own.get(key, 'nothing')} here"
        for key in sorted(saved.keys() | own.keys())
        if saved.get(key) != own.get(key)
    ]
    more = [f"and {len(wrong) - SHOWN_DIFFERENCES} more"] if len(wrong) > SHOWN_DIFFERENCES else []
    raise ValueError(
        f"{shards} is of another model than actor_rollout_ref.model.path; choose another checkpoint or set "
        "trainer.resume_mode=disable:\n" + "\n".join(f"- {line}" for line in [*wrong[:SHOWN_DIFFERENCES], *more])
    )


def _load_extra(state: TrainingState, folder: Path) -> None:
    own = folder / f"extra_rank_{dist.get_rank()}.pt"
    path = own if own.is_file() else folder / "extra_rank_0.pt"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}; leave 'extra' out of actor.checkpoint.load_contents")
    extra = torch.load(path, weights_only=True)
    state.schedule.set_steps(extra["optimizer_steps"])
    if path != own:
        logger.warning("%s has no random state of rank %d; it goes on with its own", folder, dist.get_rank())
        return
    set_rng_states(extra["rng"])

"""One rank of the trained student.

In:  batches from the controller, split over the ranks. Out: the student's log-probs, an updated model, its weights for
the rollout engines, checkpoints. The model lives here between calls; with offload it waits in host memory.

Not here: the teacher (``teacher_worker``), losses (``workers.actor``), sharding and files (``workers.fsdp``).

Letters: B rows of this rank, R response.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from verl.config import ActorRolloutRefConfig, DistillConfig
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, Execute, register
from verl.utils.device import max_memory_metrics, release_cached_memory, resolve_dtype
from verl.utils.tokenizer import hf_tokenizer
from verl.vocabulary import Vocabulary
from verl.weight_sync import WeightExporter
from verl.workers.actor.dp_actor import SCORED_KEYS, UPDATE_KEYS, DataParallelPPOActor, build_optimizer
from verl.workers.actor.losses import UPDATE_SCORES
from verl.workers.actor.teachers import RemoteTeacher, Teacher, TopKTeacher
from verl.workers.fsdp.build import build_model, join_ranks
from verl.workers.fsdp.checkpoint import CheckpointWriter, SaveOutcome, TrainingState, load_checkpoint
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.fsdp.token_stats_model import BatchSizes, move_optimizer_state, move_parameters
from verl.workers.teacher_worker import TeacherWorker


class StudentWorker(Worker):
    """Scores and trains the student.

    Args:
        config: ``actor_rollout_ref``.
        device: ``trainer.device``.
        distill: ``algorithm.distill``; None: policy-gradient losses alone.
    """

    def __init__(
        self, config: ActorRolloutRefConfig, device: str = "auto", distill: DistillConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self._distill, self._device_setting = config, distill, device
        self._teacher_heads: dict[str, list[torch.Tensor]] = {}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model, build the optimizer."""
        model, actor, rollout = self.config.model, self.config.actor, self.config.rollout
        self._device, mesh = join_ranks(self, self._device_setting, seed=rollout.seed)
        path, start = str(model.path), rollout.extend_start
        tokenizer = hf_tokenizer(model.tokenizer_path or path, trust_remote_code=model.trust_remote_code)
        module = build_model(path, model, actor.fsdp_config, mesh, trainable=True)
        vocabulary = Vocabulary(len(tokenizer), start)
        vocabulary.check_head(module.num_rows, path)
        optimizer = build_optimizer(module, actor.optim)
        self._state = TrainingState(module, optimizer, tokenizer)
        self._checkpoint_writer = CheckpointWriter(actor.checkpoint)
        self.actor = DataParallelPPOActor(
            actor,
            module,
            optimizer,
            vocabulary=vocabulary,
            scoring_sizes=BatchSizes.of_scoring(rollout),
            # The setting counts prompts over all ranks; each has n answers.
            mini_batch_rows=actor.ppo_mini_batch_size * rollout.n // self.world_size,
            distill=self._distill,
            extended_rows=None if start is None else ExtendedRows(module, start, actor.freeze_extended_rows),
        )
        self._exporter = WeightExporter(
            module,
            device=self._device,
            writes_files=self.local_rank == 0,
            dtype=resolve_dtype(rollout.dtype, self._device.type),
            bucket_bytes=rollout.weight_sync_bucket_mb * 2**20,
        )
        self._move(torch.device("cpu"), optimizer=True)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=SCORED_KEYS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """``old_log_probs``, ``entropys`` and ``extend_mass`` (B, R) of the current student."""
        with self._on_device():
            return DataProto.from_dict(self.actor.compute_token_stats(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, padding=False, reads=UPDATE_KEYS)
    def update_actor(self, data: DataProto) -> DataProto:
        """Train on a batch; the metrics are in ``meta_info["metrics"]``, the same on every rank.

        The pass of an exact objective gives what scoring would before it: those keys of ``UPDATE_SCORES`` (B, R) that
        the batch lacks are returned, at trained positions, 0 elsewhere.
        """
        distill = self._distill if self._distill is not None and self._distill.is_exact else None
        with self._on_device(optimizer=True), ExitStack() as stack:
            metrics, scores = self.actor.update(
                data, [self._teacher(distill, role, stack) for role in distill.roles] if distill else []
            )
        metrics |= max_memory_metrics(self._device.type)
        found = dict(zip(UPDATE_SCORES, scores, strict=True)) if distill else {}
        # Entropy and mass are scored with the log-probs, and are not sent here.
        scored = {key: "ref_log_prob" if key == "ref_log_prob" else "old_log_probs" for key in found}
        new = {key: value for key, value in found.items() if scored[key] not in data.batch}
        return DataProto.from_dict(new, None, {"metrics": metrics})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fetch_heads(self, handles: Mapping[str, Sequence[Any]]) -> None:
        """Fetch the heads of teachers on other ranks, by role; a head that two of them share once."""
        distinct = list(dict.fromkeys(handle for of_role in handles.values() for handle in of_role))
        values = self.object_store.get(distinct)
        heads = {handle: value.tensor("head") for handle, value in zip(distinct, values, strict=True)}
        self._teacher_heads = {role: [heads[handle] for handle in of_role] for role, of_role in handles.items()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def num_weight_buckets(self) -> int:
        """Buckets of one weight sync."""
        return self._exporter.num_buckets

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_weight_bucket(self, index: int) -> dict[str, Any] | None:
        """Share a bucket of whole weights with the engines; see `WeightExporter.export`."""
        return self._exporter.export(index)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_weight_bucket(self, index: int) -> None:
        """Free a bucket, once every engine has loaded it."""
        self._exporter.release(index)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        """Start to write a checkpoint below ``local_path``, a folder that all ranks see.

        Returns once the state is copied: training may go on while the copy is written.
        """
        with self._on_device(optimizer=True):
            self._checkpoint_writer.begin(self._state, Path(local_path), global_step, self.actor.lr_schedule.steps)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def checkpoint_outcome(self, wait: bool) -> SaveOutcome:
        """How the checkpoint that was begun last is doing; ``wait`` until it is written."""
        return self._checkpoint_writer.outcome(wait)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, global_step: int) -> None:
        """Write a checkpoint and wait for it.

        Raises:
            OSError: it could not be written.
        """
        self.begin_checkpoint(local_path, global_step)
        outcome = self.checkpoint_outcome(wait=True)
        if outcome.error:
            raise OSError(f"the checkpoint in {local_path} is not whole: {outcome.error}")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str) -> None:
        """Go on from a checkpoint that `save_checkpoint` wrote, on any number of ranks."""
        with self._on_device(optimizer=True):
            steps = load_checkpoint(self._state, self.config.actor.checkpoint, Path(local_path))
        if steps is not None:
            self.actor.lr_schedule.set_steps(steps)

    def _teacher(self, distill: DistillConfig, role: str, stack: ExitStack) -> tuple[Teacher, float]:
        """A teacher of the update, ready until ``stack`` closes, and the weight of its rows."""
        device = self._device
        knows_extended, weight = distill.knows_extended(role), distill.weight_of(role)
        if distill.topk_or_none is not None:
            return TopKTeacher(knows_extended, self.actor.vocabulary, device), weight
        if role in self._teacher_heads:
            # Between updates they are in host memory: the engine needs that of the GPU.
            heads = [head.to(device) for head in self._teacher_heads[role]]
            return RemoteTeacher(knows_extended, heads, self.object_store.get), weight
        worker = self.colocated_roles[role]
        assert isinstance(worker, TeacherWorker), f"{role} is no teacher"
        return stack.enter_context(worker.on_device()), weight

    @contextmanager
    def _on_device(self, optimizer: bool = False) -> Iterator[None]:
        """Have the parameters, and with ``optimizer`` its state, on the device for the time of the block."""
        self._move(self._device, optimizer)
        yield
        self._move(torch.device("cpu"), optimizer)

    def _move(self, device: torch.device, optimizer: bool) -> None:
        """Move the parameters, and the optimizer's state, as far as they are offloaded at all.

        What the allocator caches is released in any case: the engine needs it.
        """
        fsdp = self.config.actor.fsdp_config
        if self._device.type == "cuda" and fsdp.param_offload:
            move_parameters(self._state.module, device)
        if self._device.type == "cuda" and optimizer and fsdp.optimizer_offload:
            move_optimizer_state(self._state.optimizer, device)
        release_cached_memory(self._device.type)

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
from verl.utils.save_outcome import SaveOutcome
from verl.utils.tokenizer import hf_tokenizer
from verl.weight_sync.send import Placement, WeightExporter, WeightInfo
from verl.workers.actor.dp_actor import SCORED_KEYS, UPDATE_KEYS, DataParallelPPOActor, with_scoring_limits
from verl.workers.actor.teachers import RemoteTeacher, Teacher, TopKTeacher
from verl.workers.fsdp.build import build_model
from verl.workers.fsdp.checkpoint import CheckpointWriter, TrainingState, load_checkpoint
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.fsdp.optimizer import LearningRateSchedule, build_optimizer
from verl.workers.fsdp.process import join_ranks, require_path, softmax_size
from verl.workers.fsdp.shard import move_optimizer_state, move_parameters
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
        self.config = config
        self._distill = distill
        self._teacher_heads: dict[str, list[torch.Tensor]] = {}
        self._device_setting = device

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model, build the optimizer."""
        config, actor = self.config, self.config.actor
        self._ranks = join_ranks(self, self._device_setting, seed=config.rollout.seed)
        path = require_path("actor_rollout_ref.model.path", config.model.path)
        self._tokenizer = hf_tokenizer(
            config.model.tokenizer_path or path, trust_remote_code=config.model.trust_remote_code
        )
        built = build_model(path, config.model, actor.fsdp_config, self._ranks.mesh, trainable=True)
        start = config.rollout.extend_start
        extended_rows = None if start is None else ExtendedRows(built.module, start, actor.freeze_extended_rows)
        optimizer = build_optimizer(built.module, actor.optim)
        schedule = LearningRateSchedule(optimizer, actor.optim)
        self._state = TrainingState(built.module, optimizer, schedule, self._tokenizer)
        self._checkpoint_writer = CheckpointWriter(actor.checkpoint)
        self.actor = DataParallelPPOActor(
            actor,
            built.module,
            optimizer,
            lr_schedule=schedule,
            vocab_size=softmax_size(len(self._tokenizer), built.module),
            extend_start=start,
            extended_rows=extended_rows,
            packed=built.packed,
            mini_batch_rows=actor.ppo_mini_batch_size * config.rollout.n // self.world_size,
            distill=self._distill,
            device=self._ranks.device,
        )
        self._exporter = WeightExporter(
            built.module,
            Placement(self._ranks.device, is_node_writer=self.local_rank == 0),
            resolve_dtype(config.rollout.dtype, self._ranks.device.type),
            config.rollout.weight_sync_bucket_mb * 2**20,
        )
        self._offload(parameters=True, optimizer=True)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=SCORED_KEYS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """``old_log_probs``, ``entropys`` and ``extend_mass`` (B, R) of the current student."""
        rollout = self.config.rollout
        data = with_scoring_limits(
            data,
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
            rollout.log_prob_micro_batch_size_per_gpu,
        )
        with self._on_device():
            stats = self.actor.compute_token_stats(data)
        assert stats.entropy is not None and stats.extend_mass is not None, "compute_token_stats gives all three"
        return DataProto.from_dict(
            {"old_log_probs": stats.log_probs, "entropys": stats.entropy, "extend_mass": stats.extend_mass}
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, padding=False, reads=UPDATE_KEYS)
    def update_actor(self, data: DataProto) -> DataProto:
        """Train on a batch; the metrics stand in ``meta_info["metrics"]``, the same on every rank.

        With them ``ref_log_prob`` (B, R) where it is not in the batch and an exact objective's teachers are heard here:
        at trained positions, 0 elsewhere.
        """
        with self._on_device(optimizer=True), ExitStack() as stack:
            teachers, said = [self._teacher(role, stack) for role in self._teacher_roles()], None
            if teachers and "ref_log_prob" not in data.batch:
                said = torch.zeros(data.tensor("responses").shape, device=self._ranks.device)
            metrics = self.actor.update_policy(data, teachers, said)
        metrics |= max_memory_metrics(self._ranks.device.type)
        return DataProto.from_dict({} if said is None else {"ref_log_prob": said.cpu()}, None, {"metrics": metrics})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fetch_heads(self, handles: Mapping[str, Sequence[Any]]) -> None:
        """Fetch the heads of teachers on other ranks, by role; a head that two of them share once."""
        distinct = list(dict.fromkeys(handle for of_role in handles.values() for handle in of_role))
        heads = {
            handle: lent.tensor("head") for handle, lent in zip(distinct, self.object_store.get(distinct), strict=True)
        }
        self._teacher_heads = {role: [heads[handle] for handle in of_role] for role, of_role in handles.items()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weight_metadata(self) -> list[WeightInfo]:
        """Name, dtype and shape of every tensor that the buckets hold, in order."""
        return self._exporter.metadata()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def num_weight_buckets(self) -> int:
        """Buckets of one export."""
        return self._exporter.num_buckets

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_weight_bucket(self, index: int) -> dict[str, Any] | None:
        """Lend a bucket of whole weights to the engines; see `WeightExporter.export`."""
        return self._exporter.export(index)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_weight_bucket(self, index: int) -> None:
        """Take a bucket back, once every engine has loaded it."""
        self._exporter.release(index)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        """Start to write a checkpoint below ``local_path``, a folder that all ranks see.

        Returns once the state is copied: training may go on while the copy is written.
        """
        with self._on_device(optimizer=True):
            self._checkpoint_writer.begin(self._state, Path(local_path), global_step)

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
            load_checkpoint(self._state, self.config.actor.checkpoint, Path(local_path))

    def _teacher_roles(self) -> list[str]:
        """The teachers of an exact objective."""
        return self._distill.roles if self._distill is not None and self._distill.is_exact else []

    def _teacher(self, role: str, stack: ExitStack) -> tuple[Teacher, float]:
        """A teacher, ready until ``stack`` closes, and the weight of its rows."""
        assert self._distill is not None, "only an exact objective asks teachers"
        return self._judge(role, stack), self._distill.weight_of(role)

    def _judge(self, role: str, stack: ExitStack) -> Teacher:
        distill = self._distill
        assert distill is not None, "only an exact objective asks teachers"
        if distill.topk_or_none is not None:
            return self._topk_teacher(role)
        if role in self._teacher_heads:
            heads = [head.to(self._ranks.device) for head in self._teacher_heads[role]]
            return RemoteTeacher(distill.knows_extended(role), heads, self.object_store.get)
        peer = self.colocated_roles.get(role)
        if not isinstance(peer, TeacherWorker):
            raise ValueError(
                f"there is no teacher {role!r} beside the student; it holds {sorted(self.colocated_roles)}"
            )
        return stack.enter_context(peer.on_device())

    def _topk_teacher(self, role: str) -> TopKTeacher:
        """A teacher that named its likeliest ids before the update."""
        distill, ids, start = self._distill, self.actor.vocab_size, self.actor.extend_start
        assert distill is not None and ids is not None, "the student's vocabulary is known"
        knows_extended = distill.knows_extended(role)
        known = ids if knows_extended or start is None else min(start, ids)
        return TopKTeacher(knows_extended, known, self._ranks.device)

    @contextmanager
    def _on_device(self, optimizer: bool = False) -> Iterator[None]:
        """Have the parameters, and the optimizer's state if asked for, on the device for the time of the block."""
        device = self._ranks.device
        if self._offloads(self.config.actor.fsdp_config.param_offload):
            move_parameters(self._state.module, device)
        if optimizer and self._offloads(self.config.actor.fsdp_config.optimizer_offload):
            move_optimizer_state(self._state.optimizer, device)
        yield
        self._offload(parameters=True, optimizer=optimizer)

    def _offload(self, parameters: bool, optimizer: bool) -> None:
        """Leave the GPU to the engine: what is offloaded goes to the host, what the allocator caches goes back."""
        host = torch.device("cpu")
        if parameters and self._offloads(self.config.actor.fsdp_config.param_offload):
            move_parameters(self._state.module, host)
        if optimizer and self._offloads(self.config.actor.fsdp_config.optimizer_offload):
            move_optimizer_state(self._state.optimizer, host)
        release_cached_memory(self._ranks.device.type)

    def _offloads(self, setting: bool) -> bool:
        return setting and self._ranks.device.type == "cuda"

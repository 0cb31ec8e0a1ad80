"""One rank of a model: of the student, which is trained, or of a frozen teacher.

In:  batches from the controller, split over the ranks. Out: the student's log-probs, an updated student, its weights
for the rollout engines, checkpoints; the teachers' log-probs of the student's tokens, for a divergence objective also
their likeliest ids or hidden states. Models live here between calls; with offload they wait in host memory.

Not here: losses (``workers.actor``), sharding and files (``workers.fsdp``).

Letters: B rows of this rank, R response.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from verl.config import BASE_TEACHER, ActorRolloutRefConfig, DistillConfig, RefModelConfig, TeacherConfig
from verl.ops.linear_log_prob import score_tokens
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, Execute, register
from verl.utils.device import max_memory_metrics, release_cached_memory, resolve_dtype
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.torch_functional import real_response_tokens
from verl.vocabulary import Vocabulary, choose_replacement
from verl.weight_sync import DEFAULT_BUCKET_MB, WeightExporter
from verl.workers.actor.dp_actor import SCORED_KEYS, UPDATE_KEYS, DataParallelPPOActor, build_optimizer
from verl.workers.actor.losses import STUDENT_SCORES, UPDATE_SCORES, Advantage
from verl.workers.actor.teachers import (
    SCORES_OF_BASE,
    FullTeacher,
    ModelTeacher,
    RemoteTeacher,
    ScoredPositions,
    StitchedServedTeacher,
    StitchedTeacher,
    Teacher,
    TopKTeacher,
    empty_scores,
    hidden_states_by_row,
)
from verl.workers.fsdp.adapter import adapted_layers, merge
from verl.workers.fsdp.build import build_model, join_ranks
from verl.workers.fsdp.checkpoint import CheckpointWriter, SaveOutcome, load_checkpoint
from verl.workers.fsdp.extended_rows import ExtendedRows
from verl.workers.fsdp.token_stats_model import (
    BatchSizes,
    ScoredRows,
    TokenStatsModel,
    move_optimizer_state,
    move_parameters,
    reshard,
)
from verl.workers.fsdp.training_state import TrainingState


class StudentWorker(Worker):
    """Scores and trains the student.

    Args:
        config: ``actor_rollout_ref``.
        device: ``trainer.device``.
        distill: ``algorithm.distill``; None: policy-gradient losses alone.
        advantage_part: distillation's part of an advantage, for batches whose ``old_log_probs`` the update gives.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        device: str = "auto",
        distill: DistillConfig | None = None,
        advantage_part: Advantage | None = None,
    ) -> None:
        super().__init__()
        self._advantage_part = advantage_part
        self.config, self._distill, self._device_setting = config, distill or DistillConfig(), device
        self._teacher_heads: dict[str, list[torch.Tensor]] = {}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model, build the optimizer."""
        model, actor, rollout = self.config.model, self.config.actor, self.config.rollout
        self._device, mesh = join_ranks(self, self._device_setting, rollout.seed, actor.fsdp_config.fsdp_size)
        path, start = str(model.path), rollout.extend_start
        tokenizer = hf_tokenizer(model.tokenizer_path or path, trust_remote_code=model.trust_remote_code)
        split_over = actor.ulysses_sequence_parallel_size
        module = build_model(path, model, actor.fsdp_config, mesh, split_over, trainable=True)
        vocabulary = Vocabulary(len(tokenizer), start)
        vocabulary.check_head(module.num_rows, path)
        self._state = TrainingState(module, build_optimizer(module, actor.optim), tokenizer, {})
        self._checkpoint_writer = CheckpointWriter(actor.checkpoint)
        self.actor = DataParallelPPOActor(
            actor,
            module,
            self._state.optimizer,
            vocabulary=vocabulary,
            scoring_sizes=BatchSizes.of_scoring(rollout),
            # The setting counts prompts over all ranks; each has n answers.
            mini_batch_rows=actor.ppo_mini_batch_size * rollout.n * split_over // self.world_size,
            distill=self._distill,
            advantage_part=self._advantage_part,
            extended_rows=None
            if start is None
            else ExtendedRows(module, start, actor.freeze_extended_rows, only_extended=model.lora_extended_rows),
            averages=self._state.averages,
        )
        self._exporter = WeightExporter(
            module,
            device=self._device,
            writes_files=self.local_rank == 0,
            dtype=resolve_dtype(rollout.dtype, self._device.type),
            bucket_bytes=(rollout.weight_sync_bucket_mb or DEFAULT_BUCKET_MB[self._device.type]) * 2**20,
            merge=partial(merge, adapted_layers(module)),
        )
        self.move(torch.device("cpu"), optimizer=True)

    @property
    def module(self) -> TokenStatsModel:
        """The model."""
        return self._state.module

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=SCORED_KEYS)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """``old_log_probs``, ``entropys`` and ``extend_mass`` (B, R) of the current student."""
        with self._on_device():
            return DataProto.from_dict(self.actor.compute_token_stats(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, padding=False, reads=UPDATE_KEYS)
    def update_actor(self, data: DataProto) -> DataProto:
        """Train on a batch; the metrics are in ``meta_info["metrics"]``, the same on every rank.

        Its pass gives what scoring would before it: those keys of ``UPDATE_SCORES`` (B, R) that the batch lacks are
        returned, at trained positions, 0 elsewhere; ``ref_log_prob`` by a divergence objective alone, and likewise
        ``divergence``, where ``meta_info["keeps_divergence"]`` asks for it.
        """
        roles = self._distill.roles if self._distill.is_divergence else []
        with self._on_device(optimizer=True), ExitStack() as stack:
            metrics, scores = self.actor.update(data, [self._teacher(role, stack) for role in roles])
        metrics |= max_memory_metrics(self._device.type)
        found = dict(zip(UPDATE_SCORES if roles else STUDENT_SCORES, scores, strict=False))
        divergence = found.pop("divergence", None)
        # Entropy and mass come with the log-probs but do not travel here: ``old_log_probs`` tells whether they exist.
        scored = {key: "ref_log_prob" if key == "ref_log_prob" else "old_log_probs" for key in found}
        new = {key: value for key, value in found.items() if scored[key] not in data.batch}
        if divergence is not None and data.meta_info.get("keeps_divergence"):
            new["divergence"] = divergence
        return DataProto.from_dict(new, None, {"metrics": metrics})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fetch_heads(self, handles: Mapping[str, Sequence[Any]]) -> None:
        """Fetch the heads of teachers on other ranks, by role; a head that two of them share once."""
        distinct = list(dict.fromkeys(handle for of_role in handles.values() for handle in of_role))
        values = self.object_store.get(distinct)
        heads = {handle: value.tensor("head") for handle, value in zip(distinct, values, strict=True)}
        self._teacher_heads = {role: [heads[handle] for handle in of_role] for role, of_role in handles.items()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def weight_buckets(self) -> list[dict[str, Any]]:
        """The buckets of one weight sync; see `WeightExporter.describe`."""
        return self._exporter.describe()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def export_weight_bucket(self, index: int) -> dict[str, Any] | None:
        """Share a bucket of whole weights with the engines; see `WeightExporter.export`."""
        return self._exporter.export(index)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def store_weight_bucket(self, index: int) -> dict[str, Any] | None:
        """Send a bucket to engines with GPUs of their own, from rank 0; see `WeightExporter.store`."""
        return self._exporter.store(index, None if self.rank else self.channel or self.object_store.put)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_weight_buckets(self) -> None:
        """Free what is exported, once every engine has loaded it."""
        self._exporter.release()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        """Start to write a checkpoint below ``local_path``, a folder that all ranks see.

        Returns once the state is copied: training may go on while the copy is written.
        """
        with self._on_device(optimizer=True):
            self._checkpoint_writer.begin(self._state, Path(local_path), global_step, self.actor.optimizer_steps)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def checkpoint_outcome(self, wait: bool) -> SaveOutcome:
        """How the checkpoint that was begun last is doing; ``wait`` until it is written."""
        return self._checkpoint_writer.outcome(wait)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str) -> None:
        """Go on from a checkpoint, on any number of ranks."""
        with self._on_device(optimizer=True):
            steps = load_checkpoint(self._state, self.config.actor.checkpoint, Path(local_path))
        if steps is not None:
            self.actor.optimizer_steps = steps

    def _teacher(self, role: str, stack: ExitStack) -> tuple[Teacher, float]:
        """A teacher of the update, ready until ``stack`` closes, and the weight of its rows."""
        device, distill = self._device, self._distill
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
        self.move(self._device, optimizer)
        yield
        self.move(torch.device("cpu"), optimizer)

    def move(self, device: torch.device, optimizer: bool) -> None:
        """Move the parameters, and the optimizer's state, as far as they are offloaded at all.

        What the allocator caches is released in any case: the engine needs it.
        """
        fsdp = self.config.actor.fsdp_config
        if self._device.type == "cuda" and fsdp.param_offload:
            move_parameters(self._state.module, device)
        if self._device.type == "cuda" and optimizer and fsdp.optimizer_offload:
            move_optimizer_state(self._state.optimizer, device)
        release_cached_memory(self._device.type)


class TeacherWorker(Worker):
    """Scores the student's tokens, as a model that is frozen or, with ``ema``, follows the student.

    Its softmax runs over the shared ids alone. Ids that it lacks are replaced in its input, and their log-prob is
    ``ref_log_prob_replace_val``. A teacher with the student's vocabulary (the student's own starting weights) reads and
    scores every id; stitched to the base teacher, of its process or in the batch, it leaves the shared ids to that.

    Args:
        config: ``actor_rollout_ref``; without ``ref.model.path`` the student's own starting weights are the teacher.
        device: ``trainer.device``.
        teacher: a further teacher; None: the one of ``actor_rollout_ref.ref``.
        topk: number of likeliest ids at each trained position that `score_for_update` gives; None: none.
        exports_hidden_states: `score_for_update` puts hidden states into the object store, for other ranks' student.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        device: str = "auto",
        teacher: TeacherConfig | None = None,
        topk: int | None = None,
        exports_hidden_states: bool = False,
    ) -> None:
        super().__init__()
        self.config, self._device_setting = config, device
        self._topk, self._exports_hidden_states = topk, exports_hidden_states
        self._is_stitched = teacher is not None and teacher.is_stitched
        ref = config.ref.model if teacher is None else RefModelConfig(path=teacher.path)
        path = str(ref.path or config.model.path)
        tokenizer = ref.tokenizer_path or (path if ref.path else config.model.tokenizer_path or path)
        ema = None if teacher is None else teacher.ema
        # An average is sharded as the student; in half precision its small steps would be rounded away.
        self._fsdp = config.ref.fsdp_config if ema is None else replace(config.actor.fsdp_config, model_dtype="fp32")
        self._files = path, tokenizer, not ref.path if teacher is None else teacher.knows_extended, ema
        """Model, tokenizer, whether it knows the extended ids, and how it follows the student."""

    model: ModelTeacher
    """Shared by a process' teachers of the same files and vocabulary; or its student with the adapter switched off."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model."""
        self._device, mesh = join_ranks(self, self._device_setting, self.config.rollout.seed, self._fsdp.fsdp_size)
        others = [worker for worker in self.colocated_roles.values() if isinstance(worker, TeacherWorker)]
        same = [worker.model for worker in others if hasattr(worker, "model") and worker._files == self._files]
        self.model = same[0] if same else self._load_model(mesh)
        self._move(torch.device("cpu"))

    def _load_model(self, mesh: DeviceMesh) -> ModelTeacher:
        config, ref = self.config, self.config.ref
        path, tokenizer_path, knows_extended, ema = self._files
        read = partial(hf_tokenizer, trust_remote_code=config.model.trust_remote_code)
        words, students = read(tokenizer_path), read(config.model.tokenizer_path or str(config.model.path))
        settings = config.model, self._fsdp, mesh, ref.ulysses_sequence_parallel_size
        build, student = partial(build_model, path, *settings, trainable=False), self._student
        if ema is not None:
            followed = self.colocated_roles["actor"]
            assert isinstance(followed, StudentWorker), "a teacher that follows the student is beside it"
            averages = followed.actor.averages
            module = averages.get(ema) or averages.setdefault(ema, build())
        else:
            module = student.module if student else build()
        ids, replacement = min(len(words), len(students)), None
        if not knows_extended:
            ids = Vocabulary(ids, config.rollout.extend_start).shared_ids()
            replacement = choose_replacement(ref.ref_replace_token_id, words, ids)
        Vocabulary(ids).check_head(module.num_rows, path)
        return ModelTeacher(module, ids, replacement)

    @property
    def _student(self) -> StudentWorker | None:
        """The student of this process whose model is the teacher once its adapter is switched off."""
        student = self.colocated_roles.get("actor")
        model = self.config.model
        shares = model.lora_rank > 0 and not model.lora_extended_rows and self._files[0] == model.path
        return student if shares and isinstance(student, StudentWorker) else None

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=(*SCORED_KEYS, *SCORES_OF_BASE))
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R): the teacher's log-probs of the responses."""
        return self._score(data, real_response_tokens(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=(*SCORED_KEYS, *SCORES_OF_BASE, "response_mask"))
    def score_for_update(self, data: DataProto) -> DataProto:
        """What a later update compares the student with: the likeliest ids, or handles to hidden states.

        With them ``ref_log_prob`` (B, R), from the same pass. All of it at trained positions alone; 0 elsewhere.
        """
        trained = data.tensor("response_mask").bool()
        return self._score(data, trained, self._topk, self._exports_hidden_states)

    @torch.no_grad()
    def _score(
        self, data: DataProto, select: torch.Tensor, topk: int | None = None, exports_hidden_states: bool = False
    ) -> DataProto:
        """``ref_log_prob`` at the selected tokens; with ``topk`` the likeliest ids; handles to hidden states by row."""
        missing, temperature = self.config.ref.ref_log_prob_replace_val, data.meta_info["temperature"]
        layout = ScoredRows(data.tensor("input_ids"), data.tensor("attention_mask"), select)
        scores = empty_scores(select, topk)
        handles = np.full(len(data), None)
        with self.on_device() as teacher:
            for micro in layout.micro_batches(BatchSizes.of_scoring(self.config.ref), teacher.packed, teacher.group):
                positions = ScoredPositions(data, layout, micro.rows, micro.columns, micro.rows_by_rank)
                log_probs = teacher.log_probs_at(positions, temperature)
                drawn, top = score_tokens(log_probs, micro.inputs.labels.to(self._device), missing, topk=topk)
                # `scores` has this order: `ref_log_prob`, then TOP_TENSORS. [:3] leaves out `vocab_size`.
                for target, values in zip(scores.values(), [drawn, *(top or ())[:3]], strict=True):
                    target[micro.rows, micro.columns] = values.to(target.dtype).cpu()
                if exports_hidden_states:
                    for row, states in hidden_states_by_row(positions, log_probs):
                        handles[row] = self.object_store.put(states)
            for values in scores.values():
                teacher.group.add_up(values)
        return DataProto.from_dict(scores, {"teacher_states": handles} if exports_hidden_states else None)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_heads(self) -> list[Any]:
        """On rank 0, handles to the (V, D) heads that its hidden states go with, the base teacher's first; else none.

        A head is gathered from all ranks and put into the object store once, whichever teachers share its model.
        """
        with self.on_device() as teacher:
            for model in teacher.models:
                if model.head_handles is None:
                    # Empty on the other ranks, not None: the head is gathered by all of them, or by none.
                    head, model.head_handles = model.head(), []
                    if self.rank == 0:
                        # A copy on the CPU too: `reshard` frees the gathered head's memory.
                        exported = DataProto.from_dict({"head": head.to("cpu", copy=True)})
                        model.head_handles = [self.object_store.put(exported)]
            return [handle for model in teacher.models for handle in model.head_handles or []]

    @contextmanager
    def on_device(self) -> Iterator[FullTeacher]:
        """The teacher, on its device for the time of the block; gathered parameters are freed at its end."""
        self._move(self._device)
        base = self.colocated_roles.get(BASE_TEACHER)
        if self._is_stitched and isinstance(base, TeacherWorker):
            with base.on_device():
                yield StitchedTeacher(base.model, self.model)
        elif self._is_stitched:
            yield StitchedServedTeacher(self.model)
        else:
            yield self.model
        reshard(self.model.module)
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        """With ``param_offload`` on CUDA, keep the model in host memory except while it is used.

        What the allocator caches is released in any case: the engine needs it.
        """
        if (student := self._student) is not None:
            student.move(device, optimizer=False)
        elif self.config.ref.fsdp_config.param_offload and self._device.type == "cuda":
            move_parameters(self.model.module, device)
        release_cached_memory(self._device.type)

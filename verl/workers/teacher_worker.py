"""One rank of a frozen teacher.

In:  rollouts of a student whose vocabulary may extend the teacher's. Out: the teacher's log-probs of the student's
tokens; for an exact objective also its likeliest ids or its hidden states.

Its softmax runs over the shared ids alone. Ids that it lacks are replaced in its input, and their log-prob is
``ref_log_prob_replace_val``. A teacher with the student's vocabulary (the student's own starting weights) reads and
scores every id; stitched to the base teacher of its process, it leaves the shared ids to that one.

Letters: B rows of this rank, R response.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from verl.config import BASE_TEACHER, ActorRolloutRefConfig, RefModelConfig, TeacherConfig
from verl.ops.linear_log_prob import score_tokens
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import release_cached_memory
from verl.utils.tokenizer import hf_tokenizer
from verl.vocabulary import Vocabulary
from verl.workers.actor.dp_actor import SCORED_KEYS
from verl.workers.actor.teachers import (
    HIDDEN_STATE_HANDLES,
    TOP_TENSORS,
    FullTeacher,
    ModelTeacher,
    ScoredPositions,
    StitchedModelTeacher,
    hidden_states_by_row,
)
from verl.workers.fsdp.build import build_model, join_ranks
from verl.workers.fsdp.token_stats_model import (
    BatchSizes,
    ScoredRows,
    move_parameters,
    real_response_tokens,
    reshard,
)


class TeacherWorker(Worker):
    """Scores the student's tokens.

    Args:
        config: ``actor_rollout_ref``; without ``ref.model.path`` the student's own starting weights are the teacher.
        device: ``trainer.device``.
        teacher: a further teacher; None: the one of ``actor_rollout_ref.ref``.
        topk: number of likeliest ids at each trained position that `score_for_update` gives; None: none.
        exports_hidden_states: `score_for_update` puts hidden states into the object store, for a student on other
            ranks.
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
        self._files = path, tokenizer, not ref.path if teacher is None else teacher.knows_extended
        """Model, tokenizer, and whether it knows the extended ids."""

    model: ModelTeacher
    """The frozen model; teachers of one process with the same files and vocabulary share it."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model."""
        self._device, mesh = join_ranks(self, self._device_setting, seed=self.config.rollout.seed)
        others = [worker for worker in self.colocated_roles.values() if isinstance(worker, TeacherWorker)]
        same = [worker.model for worker in others if hasattr(worker, "model") and worker._files == self._files]
        self.model = same[0] if same else self._load_model(mesh)
        self._move(torch.device("cpu"))

    def _load_model(self, mesh: DeviceMesh) -> ModelTeacher:
        config, ref = self.config, self.config.ref
        path, tokenizer_path, knows_extended = self._files
        tokenizer = hf_tokenizer(tokenizer_path, trust_remote_code=config.model.trust_remote_code)
        module = build_model(path, config.model, ref.fsdp_config, mesh, trainable=False)
        ids, replacement = len(tokenizer), None
        if not knows_extended:
            ids = Vocabulary(ids, config.rollout.extend_start).shared_ids()
            likely = [tokenizer.pad_token_id, tokenizer.eos_token_id]
            replacement = choose_replacement(ref.ref_replace_token_id, likely, ids)
        Vocabulary(ids).check_head(module.num_rows, path)
        return ModelTeacher(module, ids, replacement)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=SCORED_KEYS)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R): the teacher's log-probs of the responses."""
        return self._score(data, real_response_tokens(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=(*SCORED_KEYS, "response_mask"))
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
        scores = {"ref_log_prob": torch.zeros(select.shape)}
        if topk is not None:
            shape = (*select.shape, topk)
            empty = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape), torch.zeros(select.shape)
            scores |= dict(zip(TOP_TENSORS, empty, strict=True))
        handles = np.full(len(data), None)
        with self.on_device() as teacher:
            for micro in layout.micro_batches(BatchSizes.of_scoring(self.config.ref), teacher.packed):
                positions = ScoredPositions(data, layout, micro.rows, micro.columns)
                log_probs = teacher.log_probs_at(positions, temperature)
                drawn, top = score_tokens(log_probs, micro.inputs.labels.to(self._device), missing, topk=topk)
                # `scores` has this order: `ref_log_prob`, then TOP_TENSORS. [:3] leaves out `vocab_size`.
                for target, values in zip(scores.values(), [drawn, *(top or ())[:3]], strict=True):
                    target[micro.rows, micro.columns] = values.to(target.dtype).cpu()
                if exports_hidden_states:
                    for row, states in hidden_states_by_row(positions, log_probs):
                        handles[row] = self.object_store.put(states)
        return DataProto.from_dict(scores, {HIDDEN_STATE_HANDLES: handles} if exports_hidden_states else None)

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
        if self._is_stitched:
            base = self.colocated_roles[BASE_TEACHER]
            assert isinstance(base, TeacherWorker), "a stitched teacher has the base teacher beside it"
            with base.on_device():
                yield StitchedModelTeacher(base.model, self.model)
        else:
            yield self.model
        reshard(self.model.module)
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        """With ``param_offload`` on CUDA, keep the model in host memory except while it is used.

        What the allocator caches is released in any case: the engine needs it.
        """
        if self.config.ref.fsdp_config.param_offload and self._device.type == "cuda":
            move_parameters(self.model.module, device)
        release_cached_memory(self._device.type)


def choose_replacement(setting: int | None, candidates: list[int | None], shared_ids: int) -> int:
    """Replacement of ids that the teacher lacks in its input: the setting, or else the first candidate that it knows.

    Raises:
        ValueError: it does not know that id, or none of the candidates.
    """
    for token in candidates if setting is None else [setting]:
        if token is not None and 0 <= token < shared_ids:
            return token
    raise ValueError(
        f"ref.ref_replace_token_id={setting} (pad, eos: {candidates}) is none of {shared_ids} ids; set one"
    )

"""One rank of the frozen teacher.

In:  rollouts of a student whose vocabulary may extend the teacher's. Out: the teacher's log-probs of the student's
tokens. The teacher's distribution runs over B alone, the ids below the extension that its tokenizer names; of anything
else it reads a stand-in and says ``ref_log_prob_replace_val``. A teacher with the student's vocabulary (the student
itself, frozen) reads and judges every id; stitched to the base teacher of its process, it leaves it the ids of B.

Letters: B rows of this rank, R response.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from verl.config import BASE_TEACHER, ActorRolloutRefConfig, RefModelConfig, TeacherConfig
from verl.ops.teacher_log_probs import score_tokens
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import release_cached_memory
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.actor.dp_actor import (
    SCORED_KEYS,
    DataParallelPPOActor,
    real_response_tokens,
    scoring_sizes,
    with_scoring_limits,
)
from verl.workers.actor.mini_batch_loss import temperature_of
from verl.workers.actor.teachers import (
    HIDDEN_STATE_HANDLES,
    TOP_TENSORS,
    FullTeacher,
    StitchedModelTeacher,
    judged,
    states_by_row,
)
from verl.workers.fsdp.build import build_model
from verl.workers.fsdp.process import join_ranks, require_path, softmax_size
from verl.workers.fsdp.shard import move_parameters, reshard


class TeacherWorker(Worker):
    """Scores the student's tokens.

    Args:
        config: ``actor_rollout_ref``; without ``ref.model.path`` the student's own starting weights are the teacher.
        device: ``trainer.device``.
        teacher: a further teacher; None: the one of ``actor_rollout_ref.ref``.
        topk: likeliest ids that it names at each trained position, besides the drawn token's log-prob; None: none.
        exports_hidden_states: put the last hidden states into the object store, for a student on other ranks.
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
        self.config = config
        self._topk, self._lends_states = topk, exports_hidden_states
        self._exported_head: list[Any] | None = None
        self._device_setting = device
        self._reads_extended = teacher is not None and teacher.knows_extended
        self._is_stitched = teacher is not None and teacher.is_stitched
        self._is_ready = False
        ref = config.ref.model if teacher is None else RefModelConfig(path=teacher.path)
        self._path = ref.path or config.model.path
        self._tokenizer_path = ref.tokenizer_path or (self._path if ref.path else config.model.tokenizer_path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Join the other ranks, load and shard the model."""
        self._ranks = join_ranks(self, self._device_setting, seed=self.config.rollout.seed)
        twin = self._same_model_worker()
        self._owner: TeacherWorker = self if twin is None else twin._owner
        self.actor: DataParallelPPOActor = self._build() if twin is None else twin.actor
        self._is_ready = True
        self._move(torch.device("cpu"))

    def _build(self) -> DataParallelPPOActor:
        config, ref = self.config, self.config.ref
        path = require_path("actor_rollout_ref.ref.model.path", self._path)
        tokenizer = hf_tokenizer(self._tokenizer_path or path, trust_remote_code=config.model.trust_remote_code)
        built = build_model(path, config.model, ref.fsdp_config, self._ranks.mesh, trainable=False)
        known, replacement = len(tokenizer), None
        if not self._reads_extended:
            known = shared_vocabulary(known, config.rollout.extend_start)
            candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id]
            replacement = choose_replacement(ref.ref_replace_token_id, candidates, known)
        return DataParallelPPOActor(
            ref,
            built.module,
            vocab_size=softmax_size(known, built.module),
            replace_token_id=replacement,
            knows_extended=self._reads_extended,
            packed=built.packed,
            device=self._ranks.device,
        )

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=SCORED_KEYS)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R): the teacher's log-probs of the responses."""
        data = self._with_limits(data)
        with self.on_device() as judge:
            if self._is_stitched:
                scores, _ = self._judge(judge, data, real_response_tokens(data))
                return DataProto.from_dict(scores)
            log_probs, _ = self.actor.compute_log_prob(data, mask_special_token=not self._reads_extended)
        return DataProto.from_dict({"ref_log_prob": log_probs})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, reads=(*SCORED_KEYS, "response_mask"))
    def teach(self, data: DataProto) -> DataProto:
        """What an update compares without this teacher beside it: the likeliest ids, or handles to hidden states.

        With them ``ref_log_prob`` (B, R), in one pass. All of it at trained positions alone; 0 elsewhere.
        """
        trained = data.tensor("response_mask").bool()
        data, states = self._with_limits(data), np.full(len(data), None)
        with self.on_device() as judge:
            scores, lent = self._judge(judge, data, trained, topk=self._topk, lends=self._lends_states)
        for row, handle in lent.items():
            states[row] = handle
        return DataProto.from_dict(scores, {HIDDEN_STATE_HANDLES: states} if self._lends_states else None)

    def _with_limits(self, data: DataProto) -> DataProto:
        ref = self.config.ref
        return with_scoring_limits(
            data,
            ref.log_prob_use_dynamic_bsz,
            ref.log_prob_max_token_len_per_gpu,
            ref.log_prob_micro_batch_size_per_gpu,
        )

    @torch.no_grad()
    def _judge(
        self, judge: FullTeacher, data: DataProto, select: torch.Tensor, topk: int | None = None, lends: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
        """``ref_log_prob`` at the selected tokens and, with ``topk``, the likeliest ids; handles by row if it lends."""
        missing, result = self.config.ref.ref_log_prob_replace_val, _room(select.shape, topk)
        handles: dict[int, Any] = {}
        sizes = scoring_sizes(data)
        for taught, log_probs in judged(judge, data, select, sizes, self.actor.packed, temperature_of(data)):
            scores = score_tokens(log_probs, taught.labels.to(self._ranks.device), missing, topk=topk)
            found = [scores.drawn] if scores.top is None else [scores.drawn, *scores.top[:3]]
            for room, values in zip(result.values(), found, strict=True):
                room[taught.rows, taught.columns] = values.to(room.dtype).cpu()
            if lends:
                handles |= {row: self.object_store.put(states) for row, states in states_by_row(taught, log_probs)}
        return result, handles

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_heads(self) -> list[Any]:
        """On rank 0 handles to the (V, D) heads that its hidden states go with, the base teacher's first; else none."""
        workers = [self._base(), self] if self._is_stitched else [self]
        return [handle for worker in workers for handle in worker._owner._head_handles()]

    def _head_handles(self) -> list[Any]:
        """Made once, whoever asks, for a head never changes; by all ranks, for it is sharded over them."""
        if self._exported_head is None:
            with self.on_device():
                head = self.actor.shared_head()
                mine = [DataProto.from_dict({"head": head.to("cpu", copy=True)})] if self.rank == 0 else []
            self._exported_head = [self.object_store.put(value) for value in mine]
        return self._exported_head

    @contextmanager
    def on_device(self) -> Iterator[FullTeacher]:
        """The teacher, on its device for the time of the block, with what it gathered freed behind it."""
        with ExitStack() as stack:
            if self._is_stitched:
                stack.enter_context(self._base().on_device())
            self._move(self._ranks.device)
            yield StitchedModelTeacher(self._base().actor, self.actor) if self._is_stitched else self.actor
            reshard(self.actor.actor_module)
            self._move(torch.device("cpu"))

    def _base(self) -> "TeacherWorker":
        """The teacher of ``actor_rollout_ref.ref``, for one that is stitched to it."""
        base = self.colocated_roles.get(BASE_TEACHER)
        assert isinstance(base, TeacherWorker), (
            f"a stitched teacher needs the base teacher beside it: {[*self.colocated_roles]}"
        )
        return base

    def _same_model_worker(self) -> "TeacherWorker | None":
        """A teacher of this process that holds the very model already, so that no second copy is loaded."""
        own = (self._path, self._tokenizer_path, self._reads_extended)
        teachers = [
            peer for peer in self.colocated_roles.values() if isinstance(peer, TeacherWorker) and peer._is_ready
        ]
        same = (peer for peer in teachers if (peer._path, peer._tokenizer_path, peer._reads_extended) == own)
        return next(same, None)

    def _move(self, device: torch.device) -> None:
        """With ``param_offload`` on CUDA, keep the model in host memory but for the time it is used.

        What the allocator caches goes back to the GPU in any case: the engine wants it.
        """
        if self.config.ref.fsdp_config.param_offload and self._ranks.device.type == "cuda":
            move_parameters(self.actor.actor_module, device)
        release_cached_memory(self._ranks.device.type)


def _room(shape: torch.Size, topk: int | None) -> dict[str, torch.Tensor]:
    """Zeros (B, R) for ``ref_log_prob`` and, with ``topk``, room for the likeliest ids."""
    room = {"ref_log_prob": torch.zeros(shape)}
    if topk is not None:
        tops = torch.zeros(*shape, topk, dtype=torch.int32), torch.zeros(*shape, topk), torch.zeros(shape)
        room |= dict(zip(TOP_TENSORS, tops, strict=True))
    return room


def shared_vocabulary(tokenizer_size: int, extend_start: int | None) -> int:
    """Number of ids in B: those the teacher's tokenizer names, below the extension."""
    return tokenizer_size if extend_start is None else min(tokenizer_size, extend_start)


def choose_replacement(setting: int | None, candidates: list[int | None], shared_ids: int) -> int:
    """What the teacher reads in place of ids it lacks: the setting, or the first candidate that it knows.

    Raises:
        ValueError: the teacher does not know the id that is set, or none of the candidates.
    """
    if setting is None:
        known = [token for token in candidates if token is not None and token < shared_ids]
        if known:
            return known[0]
        raise ValueError(
            f"none of the pad and eos tokens {candidates} is among the teacher's {shared_ids} ids; set "
            "actor_rollout_ref.ref.ref_replace_token_id"
        )
    if not 0 <= setting < shared_ids:
        raise ValueError(
            f"actor_rollout_ref.ref.ref_replace_token_id={setting} is none of the teacher's {shared_ids} ids; "
            "choose one below that"
        )
    return setting

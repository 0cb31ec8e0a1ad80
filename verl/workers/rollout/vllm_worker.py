"""What vLLM loads by name in each of its worker processes.

``WorkerExtension`` is mixed into vLLM's worker class (``worker_extension_cls``), ``SeededDraws``, ``VocabularyLimit``
and ``EndAfterExtended`` are logits processors, and ``SharedMemoryEngine`` receives weights as files; from a rank on the
same GPU vLLM's own ``ipc`` engine does.

    start_weight_update ─► layers go back to checkpoint layout, on the meta device
    update_weights      ─► tensors are kept until their layer is complete, then converted into place: vLLM's own
                           layout is fused, sharded over tensor-parallel ranks and packed for the CPU kernels
    finish_weight_update ► what came in part is converted, attention follows, tied heads and experts are packed again;
                           layers that nothing came for are found
"""

import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from verl.ops.seeded_draws import draw_tokens, seeded_uniforms
from verl.single_controller.base.worker import Channel
from verl.weight_sync import bucket_tensors
from verl.workers.rollout.vllm_settings import END, FIRST_STOP, PLACE, SEED


class WorkerExtension:
    """Its methods are called through ``collective_rpc``."""

    def exit_with_replica(self, pid: int) -> None:
        """From now on, end this process as soon as process ``pid`` has ended; vLLM's other processes follow.

        A replica that is killed (out of memory, Ctrl-C) cannot stop its engine: vLLM's processes would wait for it for
        ever and keep the GPU's memory.
        """
        process = os.pidfd_open(pid)

        def exit_after() -> None:
            select.select([process], [], [])  # readable once the process has ended
            os._exit(1)  # sys.exit would end this thread alone

        threading.Thread(target=exit_after, name="exit-with-replica", daemon=True).start()

    def draw_by_seed(self) -> None:
        """From now on, have `SeededDraws` draw the tokens."""
        runner = cast(Any, self).model_runner
        [draws] = [each for each in runner.input_batch.logitsprocs.all if isinstance(each, SeededDraws)]
        # An attribute, which vLLM itself sets to the function for the device.
        runner.sampler.topk_topp_sampler.forward = draws.forward

    def finish_and_find_unloaded(self) -> list[str]:
        """End a weight sync; the names of layers that got no weights.

        They keep the old ones, or what memory held before, and vLLM logs a warning of their class alone. Layers whose
        parameters are all another's, such as a tied head, need none.
        """
        worker = cast(Any, self)
        layers: dict[str, torch.nn.Module] = dict(worker.model_runner.get_model().named_modules())
        infos = {name: get_layerwise_info(layer) for name, layer in layers.items()}
        # Afterwards the counts are gone, and before it the parameters stand on the meta device, each by itself.
        empty = [name for name, info in infos.items() if info.can_load() and info.load_numel == 0]
        worker.finish_weight_update()
        held = {name: {id(each) for each in layer.parameters(recurse=False)} for name, layer in layers.items()}
        loaded = set().union(*(held[name] for name in layers.keys() - set(empty)))
        return [name for name in empty if held[name] - loaded]


class SeededDraws(LogitsProcessor):
    """Draws the tokens in place of vLLM's sampler: by a request's seed and a token's place in the answer.

    vLLM draws for seeded requests one after the other, and its CPU engine dies where it reads the prompt of one in
    parts. As a logits processor, which changes nothing, this is told which request is in which row.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, int, Sequence[int]]] = {}
        """Place in the batch: the seed, how many tokens an earlier request wrote, those of this one so far."""
        # Kept on the CPU, where the system takes large tensors back and clears them for the next step.
        self._probs = torch.empty(0) if device.type == "cpu" else None

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that came, went or changed places."""

        def draws(params: SamplingParams, _: list[int] | None, written: list[int]) -> tuple[int, int, list[int]]:
            given = params.extra_args or {}
            return given.get(SEED, 0), given.get(PLACE, 0), written

        process_dict_updates(self._rows, batch_update, draws)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave the logits as they are."""
        return logits

    def forward(
        self, logits: torch.Tensor, generators: Any, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N,) and log-probs (N, V) of logits (N, V), with top-k and top-p: as vLLM's ``TopKTopPSampler``."""
        logits = apply_top_k_top_p(logits, k, p)
        probs = torch.softmax(logits, -1, out=None if self._probs is None else self._probs.resize_(0))
        rows = [self._rows.get(row, (0, 0, ())) for row in range(len(logits))]
        uniforms = seeded_uniforms([seed for seed, *_ in rows], [place + len(tokens) for _, place, tokens in rows])
        return draw_tokens(probs, uniforms.to(logits.device)), logits.log_softmax(-1)


class VocabularyLimit(LogitsProcessor):
    """Forbids all ids from the tokenizer's size on, for every request.

    A model often has more embedding rows than its tokenizer has ids (Qwen3: 267 more), and their logits are whatever
    training left there. At minus infinity they have no part in the softmax either, as in the trainer's log-probs.
    Written to the interface of vLLM's V1 model runner.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab_size: int = vllm_config.additional_config["verl_vocab_size"]

    def is_argmax_invariant(self) -> bool:
        return False  # with True, vLLM leaves it out for greedy requests

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The limit is the same for every request."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits (N, V) of ids without a token to minus infinity, in place, and return them."""
        logits[:, self._vocab_size :] = -torch.inf
        return logits


class EndAfterExtended(LogitsProcessor):
    """Allows nothing but an end token after a token that ends the answer (``SamplingOptions.stop_from_id``)."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[list[int], int, int]] = {}
        """Place in the batch: the tokens so far, the first id that ends the answer, an end token."""

    def is_argmax_invariant(self) -> bool:
        return False  # with True, vLLM leaves it out for greedy requests

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that came, went or changed places."""

        def limits(params: SamplingParams, _: Any, written: list[int]) -> tuple[list[int], int, int] | None:
            given = params.extra_args or {}
            return (written, given[FIRST_STOP], given[END]) if FIRST_STOP in given else None

        process_dict_updates(self._rows, batch_update, limits)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits (N, V) of an ended answer to minus infinity except at its end token, in place; return them."""
        for place, (written, first, end) in self._rows.items():
            if written and written[-1] >= first:
                logits[place] = -torch.inf
                logits[place, end] = 0.0
        return logits


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Empty where each bucket names its file; else what a `Channel` takes, with the first process' rank."""

    rendezvous: dict[str, Any] | None = None
    rank: int = 0


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    names: list[str]
    shapes: list[list[int]]
    path: str = ""
    dtype_names: list[str] = field(default_factory=list)


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Reads each bucket from a safetensors file, or from a channel (`weight_sync`); in checkpoint layout."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Join the channel, where there is one."""
        number, rendezvous = init_info.rank + self.parallel_config.rank, init_info.rendezvous
        self._channel = None if rendezvous is None else Channel(rendezvous, number, self.device)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        self.model.load_weights(bucket_tensors(vars(update_info), torch.device("cpu"), self._channel))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if next(self.model.parameters()).is_cpu:  # elsewhere layers compute with the weights themselves
            _repack_tied_heads(self.model)
            _repack_experts(self.model)

    def shutdown(self) -> None:
        """Nothing stays open between buckets."""


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Pack tied lm heads from their new weights.

    On CPU every linear layer computes with a packed copy of its weight. vLLM 0.32 makes that copy anew for layers that
    received weights, which a tied head never does: it would go on computing logits with the old embedding.
    """
    heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    embeddings = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    tied = {id(layer.weight) for layer in embeddings if layer not in heads}  # a head is an embedding to vLLM
    for head in heads:
        if id(head.weight) in tied:
            head.quant_method.process_weights_after_loading(head)


def _repack_experts(model: torch.nn.Module) -> None:
    """Pack the experts of every mixture from their new weights, which vLLM does after the first load alone."""
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


# At import: each worker resolves `worker_extension_cls`, in this module, before it makes its transfer engine.
WeightTransferEngineFactory.register_engine("shm", __name__, "SharedMemoryEngine")

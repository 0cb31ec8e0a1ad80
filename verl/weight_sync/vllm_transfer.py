"""The worker side of a weight sync on CPU: a vLLM weight-transfer engine that reads shared memory.

In:  per bucket the path of a safetensors file under /dev/shm and the names in it, in checkpoint format.
Out: the weights in vLLM's own layout (fused, sharded over tensor-parallel ranks, packed for the CPU kernels).

    start_weight_update ─► layers go back to checkpoint layout, on the meta device
    update_weights      ─► tensors are kept until their layer is complete, then converted into place
    finish_weight_update ► what came in part is converted, attention layers follow, tied heads are packed again

The file is mapped, not read, and may be unlinked once ``update_weights`` has returned. On CUDA vLLM's own ``ipc``
engine takes this one's place. Importing this module registers the engine; ``SharedMemoryWorkerExtension`` is how vLLM's
worker processes come to import it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from verl.workers.rollout.vllm_worker import WorkerExtension

BACKEND = "shm"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    path: str
    names: list[str]


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """See the module."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to connect to: each bucket names its file."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        self.model.load_weights(_read(update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing stays open between buckets."""


class SharedMemoryWorkerExtension(WorkerExtension):
    """Adds nothing: vLLM imports the module of a worker extension in every worker, before it looks for the engine."""


def _read(update_info: SharedMemoryUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(update_info.path, framework="pt") as bucket:
        for name in update_info.names:
            yield name, bucket.get_tensor(name)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Pack tied lm heads from their new weights.

    On CPU every linear layer computes with a packed copy of its weight. vLLM 0.32 makes that copy anew for layers that
    received weights, which a tied head never does: it would go on computing logits with the old embedding.
    """
    embeddings = {id(layer.weight) for layer in model.modules() if _is_embedding(layer)}
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings:
            layer.quant_method.process_weights_after_loading(layer)


def _is_embedding(layer: torch.nn.Module) -> bool:
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)

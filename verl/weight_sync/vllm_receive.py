"""The receiver in vLLM's workers on CPU: a weight-transfer engine of vLLM that reads shared memory.

In:  per bucket the path of a safetensors file under /dev/shm and the names in it, in checkpoint format.
Out: the weights in vLLM's own layout (fused, sharded over tensor-parallel ranks, packed for the CPU kernels).

    start_weight_update ─► layers go back to checkpoint layout, on the meta device
    update_weights      ─► tensors are kept until their layer is complete, then converted into place
    finish_weight_update ► what came in part is converted, attention layers follow, tied heads are packed again

On CUDA vLLM's own ``ipc`` engine is used instead. ``verl.workers.rollout.vllm_worker`` registers this one.
"""

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from verl.weight_sync.receive import file_tensors


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Empty: each bucket names its file."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    path: str
    names: list[str]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """See the module."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        self.model.load_weights(file_tensors(update_info.path, update_info.names))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

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

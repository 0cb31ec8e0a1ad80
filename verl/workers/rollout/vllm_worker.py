"""What vLLM loads by name in each of its worker processes.

``WorkerExtension`` is mixed into vLLM's worker class (``worker_extension_cls``), ``VocabularyLimit`` is one of its
logits processors, and importing this module makes the weight-transfer engine for the CPU known to vLLM.
"""

import os
import select
import threading

import torch
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

WeightTransferEngineFactory.register_engine("shm", "verl.weight_sync.vllm_receive", "SharedMemoryEngine")


class WorkerExtension:
    """Its methods are called through ``collective_rpc``."""

    def exit_with_replica(self, pid: int) -> None:
        """From now on, end this process as soon as process ``pid`` has ended; vLLM's other processes follow.

        A replica that is killed (out of memory, Ctrl-C) cannot stop its engine: vLLM's processes would wait for it for
        ever and keep the GPU's memory.
        """
        process = os.pidfd_open(pid)

        def exit_after() -> None:
            select.select([process], [], [])
            os._exit(1)

        threading.Thread(target=exit_after, name="exit-with-replica", daemon=True).start()


class VocabularyLimit(LogitsProcessor):
    """Forbids all ids from the tokenizer's size on, for every request.

    A model often has more embedding rows than its tokenizer has ids (Qwen3: 267 more), and their logits are whatever
    training left there. At minus infinity they have no part in the softmax either, as in the trainer's log-probs.
    Written to the interface of vLLM's V1 model runner.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab_size: int = vllm_config.additional_config["verl_vocab_size"]

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The limit is the same for every request."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, V), the same tensor back."""
        logits[:, self._vocab_size :] = -torch.inf
        return logits

"""Keeps vLLM from sampling ids that the tokenizer does not name.

A model often has more embedding rows than its tokenizer has ids (Qwen3: 267 more), and their logits are whatever
training left there. In: logits (N, V). Out: the same tensor, rows' entries from the limit on at minus infinity, so that
they have no part in the softmax either: the trainer's normaliser leaves them out as well.

Loaded by vLLM in its worker processes; written to the interface of its V1 model runner.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

VOCAB_SIZE_KEY = "verl_vocab_size"
"""Key of vLLM's ``additional_config`` that holds the limit."""


class VocabularyLimit(LogitsProcessor):
    """Forbids all ids from the tokenizer's size on, for every request."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab_size: int = vllm_config.additional_config[VOCAB_SIZE_KEY]

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing to remember: the limit is the same for every request."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, self._vocab_size :] = -torch.inf
        return logits

"""The model to load (``actor_rollout_ref.model`` and ``actor_rollout_ref.ref.model``)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class HFModelConfig:
    """A causal language model in Hugging Face format."""

    path: str | None = None
    """Folder (or hub name) of the weights, the config and the tokenizer. Required."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer where it is not ``path``."""
    trust_remote_code: bool = False
    """Run model code that ships with the weights."""
    use_remove_padding: bool = True
    """Compute no padding: rows are packed where the attention implementation can keep them apart,
    else cut to the longest of each micro-batch."""
    enable_gradient_checkpointing: bool = True
    """Recompute each block in backward instead of keeping its activations."""
    enable_activation_offload: bool = False
    """Keep the activations that backward needs in host memory (CUDA only)."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Entries laid over the model's own config, such as ``attn_implementation``."""


@dataclass
class RefModelConfig:
    """The teacher's model; everything but these keys is taken from ``actor_rollout_ref.model``."""

    path: str | None = None
    """Folder (or hub name) of the teacher; null: the student's own starting weights."""
    tokenizer_path: str | None = None
    """Folder of the teacher's tokenizer where it is not ``path``."""

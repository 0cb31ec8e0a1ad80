"""How a model is sharded, kept in memory and checkpointed (``*.fsdp_config``, ``actor.checkpoint``).

``FSDPConfig`` serves the student and the teacher, so its messages name only the field; ``to_typed`` puts the section
first.
"""

from dataclasses import dataclass, field

DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass
class MixedPrecisionConfig:
    """Precision of FSDP2 compute and gradient reduction."""

    param_dtype: str = "auto"
    """Precision of the forward and backward pass; ``auto``: bf16 on CUDA, fp32 on CPU."""
    reduce_dtype: str = "fp32"
    """Precision in which gradients are reduced over ranks."""

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(DTYPES)}")


@dataclass
class FSDPConfig:
    """Sharding of one model over the training ranks with FSDP2."""

    param_offload: bool = False
    """Keep the parameters in host memory while the model is idle (CUDA only)."""
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory between updates (CUDA only)."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each block's forward pass: less memory, one more gather in backward."""
    model_dtype: str = "auto"
    """Precision of the stored parameters; ``auto``: fp32 for a trained model, that of compute for a frozen one."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)

    def __post_init__(self) -> None:
        if self.model_dtype not in DTYPES:
            raise ValueError(f"model_dtype={self.model_dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass
class CheckpointConfig:
    """What a checkpoint holds and what is read back from it."""

    save_contents: list[str] = field(default_factory=lambda: ["model", "optimizer", "extra", "hf_model"])
    """Any of ``model`` and ``optimizer`` (shards), ``extra`` (schedule and RNG), ``hf_model`` (weights in
    ``huggingface/``, for transformers and vLLM; ``python -m verl.model_merger merge`` makes them of ``model``)."""
    load_contents: list[str] = field(default_factory=lambda: ["model", "optimizer", "extra"])
    """Parts read on resume."""

    def __post_init__(self) -> None:
        parts = {"model", "optimizer", "extra", "hf_model"}
        for name in ("save_contents", "load_contents"):
            unknown = set(getattr(self, name)) - parts
            if unknown:
                raise ValueError(
                    f"actor_rollout_ref.actor.checkpoint.{name} holds {sorted(unknown)}; "
                    f"choose from {', '.join(sorted(parts))}"
                )

"""Verl's name for the workers' settings in `verl.config`."""

from verl.config import (
    ANY,
    BASE_TEACHER,
    AgentConfig,
    CheckpointConfig,
    DistillConfig,
    FSDPActorConfig,
    FSDPConfig,
    HFModelConfig,
    MixedPrecisionConfig,
    MultiTurnConfig,
    OptimizerConfig,
    RefConfig,
    RefModelConfig,
    RolloutConfig,
    SamplingConfig,
    TeacherConfig,
)

__all__ = [
    "ANY",
    "BASE_TEACHER",
    "AgentConfig",
    "CheckpointConfig",
    "DistillConfig",
    "FSDPActorConfig",
    "FSDPConfig",
    "HFModelConfig",
    "MixedPrecisionConfig",
    "MultiTurnConfig",
    "OptimizerConfig",
    "RefConfig",
    "RefModelConfig",
    "RolloutConfig",
    "SamplingConfig",
    "TeacherConfig",
]

"""Typed settings of the workers."""

from verl.workers.config.actor import FSDPActorConfig, RefConfig
from verl.workers.config.distill import ANY, BASE_TEACHER, DistillConfig, TeacherConfig
from verl.workers.config.engine import CheckpointConfig, FSDPConfig, MixedPrecisionConfig
from verl.workers.config.model import HFModelConfig, RefModelConfig
from verl.workers.config.optimizer import OptimizerConfig
from verl.workers.config.rollout import AgentConfig, MultiTurnConfig, RolloutConfig, SamplingConfig

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

"""Typed settings of a run, one file a section; reads and writes no file."""

from verl.config.actor import (
    CheckpointConfig,
    FSDPActorConfig,
    FSDPConfig,
    HFModelConfig,
    MixedPrecisionConfig,
    OptimizerConfig,
    RefConfig,
    RefModelConfig,
)
from verl.config.algorithm import (
    ANY,
    BASE_TEACHER,
    AlgoConfig,
    DistillConfig,
    KLControlConfig,
    RolloutCorrectionConfig,
    TeacherConfig,
)
from verl.config.data import CustomClassConfig, DataConfig, PromptTemplateConfig, SyntheticItemPromptsConfig
from verl.config.ppo import ActorRolloutRefConfig, PPOConfig, RayKwargsConfig
from verl.config.rollout import AgentConfig, MultiTurnConfig, RolloutConfig, SamplingConfig
from verl.config.trainer import TrainerConfig

__all__ = [
    "ANY",
    "BASE_TEACHER",
    "ActorRolloutRefConfig",
    "AgentConfig",
    "AlgoConfig",
    "CheckpointConfig",
    "CustomClassConfig",
    "DataConfig",
    "DistillConfig",
    "FSDPActorConfig",
    "FSDPConfig",
    "HFModelConfig",
    "KLControlConfig",
    "MixedPrecisionConfig",
    "MultiTurnConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PromptTemplateConfig",
    "RayKwargsConfig",
    "RefConfig",
    "RefModelConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "SamplingConfig",
    "SyntheticItemPromptsConfig",
    "TeacherConfig",
    "TrainerConfig",
]

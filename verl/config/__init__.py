"""Typed settings of a run, one file a section; reads and writes no file."""

from verl.config.actor import FSDPActorConfig, RefConfig
from verl.config.algorithm import AlgoConfig, KLControlConfig, RolloutCorrectionConfig
from verl.config.data import CustomClassConfig, DataConfig
from verl.config.distill import ANY, BASE_TEACHER, DistillConfig, TeacherConfig
from verl.config.engine import CheckpointConfig, FSDPConfig, MixedPrecisionConfig
from verl.config.model import HFModelConfig, RefModelConfig
from verl.config.optimizer import OptimizerConfig
from verl.config.ppo import ActorRolloutRefConfig, PPOConfig, RayKwargsConfig
from verl.config.rollout import AgentConfig, MultiTurnConfig, RolloutConfig, SamplingConfig
from verl.config.synthetic_items import PromptTemplateConfig, SyntheticItemPromptsConfig
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

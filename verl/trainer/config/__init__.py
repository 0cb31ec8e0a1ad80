"""Typed settings of a run."""

from verl.trainer.config.algorithm import AlgoConfig, KLControlConfig, RolloutCorrectionConfig
from verl.trainer.config.config import ActorRolloutRefConfig, PPOConfig, RayKwargsConfig
from verl.trainer.config.data import CustomClassConfig, DataConfig
from verl.trainer.config.synthetic_items import PromptTemplateConfig, SyntheticItemPromptsConfig
from verl.trainer.config.trainer import TrainerConfig

__all__ = [
    "ActorRolloutRefConfig",
    "AlgoConfig",
    "CustomClassConfig",
    "DataConfig",
    "KLControlConfig",
    "PPOConfig",
    "PromptTemplateConfig",
    "RayKwargsConfig",
    "RolloutCorrectionConfig",
    "SyntheticItemPromptsConfig",
    "TrainerConfig",
]

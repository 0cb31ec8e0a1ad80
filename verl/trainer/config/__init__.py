"""Verl's name for the settings in `verl.config`; the YAML defaults lie here."""

from verl.config import (
    ActorRolloutRefConfig,
    AlgoConfig,
    CustomClassConfig,
    DataConfig,
    KLControlConfig,
    PPOConfig,
    PromptTemplateConfig,
    RayKwargsConfig,
    RolloutCorrectionConfig,
    SyntheticItemPromptsConfig,
    TrainerConfig,
)

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

"""How much of everything (``sizes.yaml``), as the configs of all steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.real_model.data import DataConfig, PromptsConfig
from experiments.real_model.distil import DistilConfig
from experiments.real_model.judge import JudgeConfig
from recipe.onpolicy_distill.quickstart.models import TrainingConfig
from verl.utils.device import cpu_multiplies_in_bf16


@dataclass(frozen=True)
class Sizes:
    """The configs of all steps."""

    prompts: PromptsConfig
    data: DataConfig
    student: TrainingConfig
    judge: JudgeConfig
    distil: DistilConfig


def computes_in_bf16() -> bool:
    """Whether this machine multiplies in bf16."""
    return torch.cuda.is_available() or cpu_multiplies_in_bf16()


def sizes_of(name: str, seed: int, bf16: bool | None = None) -> Sizes:
    """The configs of a size; ``bf16`` None: where the machine multiplies in it."""
    own: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text("utf-8"))[name]
    common = {"seed": seed, "bf16": computes_in_bf16() if bf16 is None else bf16}
    return Sizes(
        PromptsConfig(**common | own.get("prompts", {})),
        DataConfig(seed, **own.get("data", {})),
        TrainingConfig(**common | {"max_threads": 64} | own["student"]),
        JudgeConfig(**common | own.get("judge", {})),
        DistilConfig(**common | own.get("distil", {})),
    )

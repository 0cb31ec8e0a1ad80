"""How much of everything: the full study, one of some minutes, and one that only shows that all fits together.

In: a size's name, a seed, and whether the CPU computes in bf16. Out: the configs of all steps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from experiments.real_model.data import DataConfig
from experiments.real_model.distil import DistilConfig
from experiments.real_model.judge import JudgeConfig
from experiments.real_model.prompts import PromptsConfig
from recipe.onpolicy_distill.quickstart.models import TrainingConfig


@dataclass(frozen=True)
class Sizes:
    """The configs of all steps."""

    prompts: PromptsConfig
    data: DataConfig
    student: TrainingConfig
    judge: JudgeConfig
    distil: DistilConfig


PARTS = ("prompts", "data", "student", "judge", "distil")
SIZES: dict[str | None, dict[str, dict[str, Any]]] = {
    None: {
        "data": {"history": 12},
        "student": {"steps": 300, "batch_size": 16, "learning_rate": 3e-4},
        "distil": {"steps": 120},
    },
    "small": {
        "prompts": {"train": 40, "test": 8},
        "data": {"items": 32, "history": 4, "rec_train": 500, "test_users": 32, "test_about": 8},
        "student": {"steps": 16, "batch_size": 8, "learning_rate": 3e-4},
        "judge": {"ifeval_prompts": 12, "ifeval_tokens": 64, "chat_tokens": 32},
        "distil": {"steps": 4, "prompts": 8, "answer_tokens": 32},
    },
    "tiny": {
        "prompts": {"train": 40, "test": 4, "from_teacher": False},
        "data": {"items": 16, "history": 3, "rec_train": 100, "test_users": 8, "test_about": 4},
        "student": {"steps": 3, "batch_size": 4, "learning_rate": 3e-3},
        "judge": {"ifeval_prompts": 4, "ifeval_tokens": 12, "chat_tokens": 12},
        "distil": {"steps": 2, "prompts": 8, "answer_tokens": 12},
    },
}
"""What differs from the configs' own defaults, by name; None: the full study."""


def computes_in_bf16() -> bool:
    """Whether this machine multiplies in bf16: a GPU, or a CPU with AMX."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def sizes_of(name: str | None, seed: int, bf16: bool | None = None) -> Sizes:
    """The configs of a size; ``bf16`` None: where the machine multiplies in it."""
    bf16 = computes_in_bf16() if bf16 is None else bf16
    engine = {"dtype": "bfloat16" if bf16 else "float32", "cpu_kvcache_space_gb": 2.0, "max_num_seqs": 64}
    engine |= {"name": "hf"} if name == "tiny" else {}
    own: dict[str, dict[str, Any]] = {part: SIZES[name].get(part, {}) | {"seed": seed} for part in PARTS}
    return Sizes(
        PromptsConfig(**own["prompts"], bf16=bf16),
        DataConfig(**own["data"]),
        TrainingConfig(**own["student"], bf16=bf16, max_threads=64),
        JudgeConfig(**own["judge"], rollout=tuple(engine.items())),
        DistilConfig(**own["distil"], bf16=bf16),
    )

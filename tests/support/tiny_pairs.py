"""A teacher and a student whose vocabulary extends the teacher's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pair:
    """A teacher and a student whose vocabulary extends the teacher's."""

    teacher: Path
    student: Path
    extend_vocab_start_token: int


def make_pair(teacher_tokenizer: Path, student_tokenizer: Path, out: Path, **settings: Any) -> Pair:
    """Random models of 64 hidden units; ``settings`` are further ones of ``TinyPairConfig``."""
    import torch

    from recipe.onpolicy_distill.tiny_models import TinyPairConfig, build_tiny_models
    from verl.utils.tokenizer import hf_tokenizer

    with torch.random.fork_rng(devices=[]):
        teacher, student = build_tiny_models(
            teacher_tokenizer, student_tokenizer, out, TinyPairConfig(**{"hidden": 64, **settings})
        )
    return Pair(teacher, student, len(hf_tokenizer(teacher_tokenizer)))

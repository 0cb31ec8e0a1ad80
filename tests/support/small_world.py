"""A world and models of a size that tests can afford."""

from pathlib import Path

from recipe.onpolicy_distill.quickstart.models import StudentConfig, TeacherConfig
from recipe.onpolicy_distill.quickstart.world import World, WorldConfig, build

SMALL = {"general_train": 200, "general_test": 25, "rec_train": 200, "test_users": 20, "test_captions": 5}
SMALL |= {"items": 16, "tastes": 4, "codes_per_level": 4, "history": 4}
SHORT_TEACHER = {"steps": 3, "batch_size": 8, "hidden": 32, "layers": 1, "heads": 2}
SHORT_STUDENT = {"steps": 3, "batch_size": 8}


def build_small_world(folder: Path, **changes: int) -> World:
    """A small world, with ``changes`` to its settings."""
    return build(folder, WorldConfig(**{**SMALL, **changes}))


def short_teacher(**changes: int) -> TeacherConfig:
    """A teacher that learns for three steps."""
    return TeacherConfig(**{**SHORT_TEACHER, **changes})


def short_student(**changes: int) -> StudentConfig:
    """A student that learns for three steps."""
    return StudentConfig(**{**SHORT_STUDENT, **changes})

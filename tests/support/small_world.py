"""A world and models of a size that tests can afford."""

from pathlib import Path
from typing import Any

from recipe.onpolicy_distill.quickstart.models import StudentConfig, TeacherConfig, make_student, make_teacher
from recipe.onpolicy_distill.quickstart.world import World, WorldConfig, build

SMALL = {"general_train": 200, "general_test": 25, "rec_train": 200, "test_users": 20, "test_captions": 5}
SMALL |= {"items": 16, "tastes": 4, "codes_per_level": 4, "history": 4}
SHORT_STUDENT = {"steps": 3, "batch_size": 8}
SHORT_TEACHER = SHORT_STUDENT | {"hidden": 32, "layers": 1, "heads": 2}


def build_small_world(folder: Path, **changes: int) -> World:
    """A small world, with ``changes`` to its settings."""
    return build(folder, WorldConfig(**{**SMALL, **changes}))


def make_small_models(
    world: World, folder: Path, teacher_changes: dict[str, Any] | None = None, **student_changes: Any
) -> tuple[Path, Path]:
    """Teacher and student of a world that learn for three steps, with changes to their settings."""
    teacher = make_teacher(world, folder, TeacherConfig(**{**SHORT_TEACHER, **(teacher_changes or {})}))
    return teacher, make_student(world, teacher, folder, StudentConfig(**{**SHORT_STUDENT, **student_changes}))

"""The worlds that are forgotten and recovered in, ready to distil.

In: a world's name and a student's seed. Out: files, teacher, student, and the prompts to rehearse, made once below a
folder and found there again. Everything that is drawn comes from the one seed, the models included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.retention import online_retail
from experiments.retention.synthetic import PromptShape, synthetic_prompts
from experiments.retention.variants import HISTORIES
from recipe.onpolicy_distill.quickstart import models, world
from recipe.onpolicy_distill.quickstart.distillation import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from recipe.onpolicy_distill.quickstart.world import World

TEST_USERS = 2048
"""Of the quickstart's world: with its own 512, one standard error of a run's kept Recall@1 is 2 points."""


@dataclass(frozen=True)
class Prepared:
    """A world with its models."""

    world: World
    teacher: Path
    student: Path
    rehearsal: dict[str, Path]
    """Parquet with prompts of the recommender, by `variants.HISTORIES`, ``ITEMS`` and ``CODES``."""
    max_prompt_tokens: int
    max_answer_tokens: int


def prepare(name: str, student_seed: int, folder: Path) -> Prepared:
    """Make a world and its models, or find them.

    Raises:
        ValueError: there is no such world, or what it is made from is not here.
    """
    if name not in WORLDS:
        raise ValueError(f"--world {name} is not one of {', '.join(WORLDS)}")
    return WORLDS[name](student_seed, folder)


def _quickstart(seed: int, folder: Path) -> Prepared:
    """Letters and sums; a catalogue of 128 items; the student learned items alone."""
    config = world.WorldConfig(seed=seed, test_users=TEST_USERS)
    built = world.build(folder, config)
    teacher = models.make_teacher(built, folder, models.TeacherConfig(seed=seed))
    student = models.make_student(built, teacher, folder, models.StudentConfig(seed=seed))
    shape = PromptShape(seed, config.history, config.caption_share, config.codes_per_level)
    rehearsal = {HISTORIES: built.rec_train, **synthetic_prompts(built, shape, folder)}
    return Prepared(built, teacher, student, rehearsal, MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS)


def _online_retail(seed: int, folder: Path) -> Prepared:
    """Real purchases over real tokenizers; the student learned both for a while, and then items alone."""
    config = online_retail.OnlineRetailConfig(seed=seed)
    built = online_retail.build(folder, config)
    teacher = models.make_teacher(built, folder, models.TeacherConfig(seed=seed, steps=600))
    learning = models.StudentConfig(seed=seed, mixed_steps=300, steps=1000, batch_size=64)
    student = models.make_student(built, teacher, folder, learning)
    shape = PromptShape(seed, config.history, config.caption_share, codes_per_level=64, source=online_retail.SOURCE)
    rehearsal = {HISTORIES: built.rec_train, **synthetic_prompts(built, shape, folder)}
    return Prepared(built, teacher, student, rehearsal, MAX_PROMPT_TOKENS, config.title_tokens + 2)


WORLDS: dict[str, Callable[[int, Path], Prepared]] = {"quickstart": _quickstart, "online_retail": _online_retail}

"""What distillation minimises (``algorithm.distill``)."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

SAMPLED, EXACT, JSD, TOPK = "sampled", "exact", "jsd", "topk"
OBJECTIVES = (SAMPLED, EXACT, "forward_kl", JSD, TOPK)
DEFAULT_TOPK, DEFAULT_BETA, DEFAULT_LEAK_TARGET = 64, 0.5, 1e-4
SUPPORTS = ("full", "shared")
ANY, WITH_ITEMS, WITHOUT_ITEMS = "any", "with_items", "without_items"
PROMPTS = (ANY, WITH_ITEMS, WITHOUT_ITEMS)
STITCHED = "stitched"
VOCABULARIES = ("base", "full", STITCHED)
BASE_TEACHER = "ref"
"""Role of the teacher of ``actor_rollout_ref.ref``, which judges every row that no other teacher claims."""
EVERY_SOURCE = ""
"""Stands for any source: the patterns that match it are those that match all."""

RESERVED_ROLES = (BASE_TEACHER, "actor")


@dataclass
class TeacherConfig:
    """A further teacher."""

    path: str | None = None
    """Folder or hub name; null: the student as it was before the run, frozen."""
    vocabulary: str = "full"
    """``full``: it knows all of the student's ids, reads item tokens and judges them. ``base``: it knows what the
    teacher of ``actor_rollout_ref.ref`` knows. ``stitched``: it knows all ids and says how much item tokens get and
    which of them; among all others that teacher decides. For text that mixes both."""
    sources: list[str] = field(default_factory=lambda: ["*"])
    """Sources of the rows it judges, as shell patterns (``rec_*``)."""
    prompts: str = ANY
    """Which rows of these sources: ``any``, those whose prompt holds an item token (``with_items``), or those whose
    prompt holds none (``without_items``)."""
    weight: float = 1.0
    """Of its rows in the loss."""

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary={self.vocabulary!r} is not one of {', '.join(VOCABULARIES)}")
        if self.prompts not in PROMPTS:
            raise ValueError(f"prompts={self.prompts!r} is not one of {', '.join(PROMPTS)}")
        if not self.sources:
            raise ValueError("sources is empty; name the sources of its rows, or '*'")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must not be negative")

    @property
    def knows_extended(self) -> bool:
        """Whether it knows item tokens."""
        return self.vocabulary != "base"

    @property
    def is_stitched(self) -> bool:
        """Whether the base teacher speaks for it on the ids that both know."""
        return self.vocabulary == STITCHED

    def judges(self, source: str, has_extended: bool) -> bool:
        """Whether it judges the rows of a source whose prompt holds item tokens, or holds none."""
        if self.prompts != ANY and has_extended != (self.prompts == WITH_ITEMS):
            return False
        return any(fnmatchcase(source, pattern) for pattern in self.sources)


@dataclass
class DistillConfig:
    """Objective of on-policy distillation."""

    objective: str = SAMPLED
    """``sampled``: the advantage of the drawn token, by policy gradient. ``exact``: the whole reverse KL at every
    trained position, differentiated directly; likewise ``forward_kl``, and ``jsd`` with ``beta``. ``topk``:
    the reverse KL as far as the teacher's ``topk`` likeliest ids tell it, for teachers that give no more."""
    topk: int = DEFAULT_TOPK
    """Likeliest ids of the teacher at each position that ``topk`` compares; all others it knows count as one."""
    beta: float = DEFAULT_BETA
    """Share of the teacher in the mixture of ``jsd``."""
    support: str = "full"
    """``full``: the student's distribution over all its ids. ``shared``: over the ids that the teacher knows, so that
    the mass on item tokens neither counts nor moves."""
    leak_coef: float = 0.0
    """Weight of the term that keeps the student's mass on item tokens at ``leak_target``; needs an exact objective."""
    leak_target: float = DEFAULT_LEAK_TARGET
    """Mass on item tokens that is aimed at."""
    coef: float | None = None
    """Weight of distillation beside a task reward, where ``algorithm.adv_estimator`` is another than
    ``on_policy_distill``: with ``sampled`` the advantages are added token by token, with an exact objective the losses.
    null or 0: none."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Further teachers by name. A row belongs to the first of them that its source and its prompt match, else to the
    teacher of ``actor_rollout_ref.ref``."""

    def __post_init__(self) -> None:
        key = "algorithm.distill"
        for name, value, known in (("objective", self.objective, OBJECTIVES), ("support", self.support, SUPPORTS)):
            if value not in known:
                raise ValueError(f"{key}.{name}={value!r} is not one of {', '.join(known)}")
        for name in ("beta", "leak_target"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("leak_coef", "coef"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must not be negative")
        if self.topk < 1:
            raise ValueError(f"{key}.topk={self.topk} must be at least 1")
        if self.objective == SAMPLED:
            self._check_sampled()
        self._check_own_settings()
        self._check_teachers()
        self.check_base_settings([(EVERY_SOURCE, True), (EVERY_SOURCE, False)])

    def _check_own_settings(self) -> None:
        """Settings of one objective or one term, left at their defaults where there is another or none."""
        key = "algorithm.distill"
        for name, default, objective in (("topk", DEFAULT_TOPK, TOPK), ("beta", DEFAULT_BETA, JSD)):
            value = getattr(self, name)
            if self.objective != objective and value != default:
                raise ValueError(
                    f"{key}.{name}={value} has no effect with {key}.objective={self.objective}; set "
                    f"{key}.objective={objective}, or leave it at {default}"
                )
        if not self.leak_coef and self.leak_target != DEFAULT_LEAK_TARGET:
            raise ValueError(
                f"{key}.leak_target={self.leak_target} has no effect with {key}.leak_coef={self.leak_coef}; set "
                f"{key}.leak_coef above 0, or leave it at {DEFAULT_LEAK_TARGET}"
            )

    def _check_sampled(self) -> None:
        """Settings that need an exact objective, left at their defaults."""
        key = "algorithm.distill"
        given: dict[str, tuple[object, object]] = {
            "support": (self.support, "full"),
            "leak_coef": (self.leak_coef, 0.0),
        }
        if not self.coef:
            given |= {f"teachers.{name}.weight": (teacher.weight, 1.0) for name, teacher in self.teachers.items()}
        for setting, (found, default) in given.items():
            if found != default:
                raise ValueError(
                    f"{key}.{setting}={found} has no effect with {key}.objective=sampled, which follows the drawn "
                    f"token alone; set {key}.objective=exact, or leave it at {default}"
                )

    def _check_teachers(self) -> None:
        key = "algorithm.distill.teachers"
        for name in {*RESERVED_ROLES} & {*self.teachers}:
            raise ValueError(f"{key}.{name}: that name is taken by actor_rollout_ref.{name}; choose another")
        reads = [teacher.knows_extended for teacher in self.teachers.values()]
        if reads != sorted(reads, reverse=True):
            vocabularies = [teacher.vocabulary for teacher in self.teachers.values()]
            raise ValueError(
                f"{key} lists {list(self.teachers)} with the vocabularies {vocabularies}; list those with the "
                "vocabulary base last, so that it is plain which prompts may hold item tokens"
            )

    def check_base_settings(self, kinds: Iterable[tuple[str, bool]]) -> None:
        """Hold settings for rows whose teacher lacks item tokens to there being such rows.

        Args:
            kinds: source of each kind of row, and whether its prompt holds item tokens.

        Raises:
            ValueError: such a setting, and teachers that know item tokens judge all rows.
        """
        if not all(self.teacher_knows_extended(source, has_extended) for source, has_extended in kinds):
            return
        for name, value, default in (("support", self.support, "full"), ("leak_coef", self.leak_coef, 0.0)):
            if value != default:
                raise ValueError(
                    f"algorithm.distill.{name}={value} has no effect: it is for rows whose teacher lacks the item "
                    f"tokens, and algorithm.distill.teachers gives all rows to {list(self.teachers)}, which know them; "
                    f"leave it at {default}, or give each teacher the sources that are its own, such as [rec_*]"
                )

    @property
    def is_exact(self) -> bool:
        """Whether distributions are compared, rather than the drawn tokens."""
        return self.objective != SAMPLED

    @property
    def has_policy_loss(self) -> bool:
        """Whether the update follows an advantage; a divergence without a task reward beside it does not."""
        return not self.is_exact or bool(self.coef)

    @property
    def topk_or_none(self) -> int | None:
        """Likeliest ids that teachers are asked for before the update; None: none."""
        return self.topk if self.objective == TOPK else None

    @property
    def needs_full_distribution(self) -> bool:
        """Whether the update needs the teachers' whole distributions."""
        return self.is_exact and self.objective != TOPK

    @property
    def roles(self) -> list[str]:
        """All teachers, the one of ``actor_rollout_ref.ref`` first; a row's ``teacher`` is a place in this list."""
        return [BASE_TEACHER, *self.teachers]

    def teacher_of(self, source: str, has_extended: bool = False) -> int:
        """Place of the teacher that judges the rows of a source whose prompt holds item tokens, or holds none."""
        for place, teacher in enumerate(self.teachers.values(), 1):
            if teacher.judges(source, has_extended):
                return place
        return 0

    @property
    def routes_by_prompt(self) -> bool:
        """Whether a row's teacher depends on what its prompt holds."""
        return any(teacher.prompts != ANY for teacher in self.teachers.values())

    @property
    def extended_sources(self) -> list[str]:
        """Patterns of the sources whose prompts may hold item tokens, for the teacher of such prompts knows them."""
        # Teachers that know them come first in the list, so none of the others takes such a row from them.
        readers = [t for t in self.teachers.values() if t.knows_extended and t.prompts != WITHOUT_ITEMS]
        return [pattern for teacher in readers for pattern in teacher.sources]

    def weight_of(self, role: str) -> float:
        """Weight of a teacher's rows in the loss."""
        return 1.0 if role == BASE_TEACHER else self.teachers[role].weight

    def knows_extended(self, role: str) -> bool:
        """Whether a teacher knows item tokens."""
        return role != BASE_TEACHER and self.teachers[role].knows_extended

    def teacher_knows_extended(self, source: str, has_extended: bool = False) -> bool:
        """Whether the teacher of such rows knows item tokens."""
        return self.knows_extended(self.roles[self.teacher_of(source, has_extended)])

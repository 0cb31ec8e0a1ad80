"""Advantages, distillation and corrections (``algorithm``)."""

from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from verl.config import schema
from verl.config.actor_rollout_ref import KLEstimator
from verl.config.model import AnyTeacherConfig
from verl.config.schema import Count, Fraction, NonNegativeFloat, NullIsEmpty, PositiveFloat, Texts, UserPath, section

SAMPLED, JSD, TOPK = "sampled", "jsd", "topk"
ANY, WITH_ITEMS, WITHOUT_ITEMS = "any", "with_items", "without_items"
STITCHED = "stitched"
BASE_TEACHER = "ref"
"""Role of the teacher of ``actor_rollout_ref.ref``, which scores every row that no other teacher claims."""
RESERVED_ROLES = (BASE_TEACHER, "actor")
ANY_SOURCE = ""
"""A source that only patterns for all sources match."""


class AdvantageEstimator(StrEnum):
    """Names of the built-in advantage estimators."""

    ON_POLICY_DISTILL = "on_policy_distill"
    GRPO = "grpo"
    RLOO = "rloo"
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"
    REINFORCE_PLUS_PLUS_BASELINE = "reinforce_plus_plus_baseline"


OpenFraction = Annotated[float, Field(gt=0, lt=1)]


@section()
class TeacherConfig(AnyTeacherConfig):
    """A further teacher."""

    path: UserPath | None = None
    """Folder or hub name; not read with ``url``; null: the student as it was before the run, frozen."""
    vocabulary: Literal["base", "full", "stitched"] = "full"
    """``full``: it knows all of the student's ids, item tokens included. ``base``: it knows what the teacher of
    ``actor_rollout_ref.ref`` knows. ``stitched``, for text that mixes both: it knows all ids and decides the
    probability of item tokens, and the teacher of ``actor_rollout_ref.ref`` decides among all others."""
    sources: Annotated[Texts, Field(min_length=1)] = field(default_factory=lambda: ["*"])
    """Sources of the rows it scores, as shell patterns (``rec_*``)."""
    prompts: Literal["any", "with_items", "without_items"] = "any"
    """Which rows of these sources: ``any``, those whose prompt holds an item token (``with_items``), or those whose
    prompt holds none (``without_items``)."""
    weight: NonNegativeFloat = 1.0
    """Weight of its rows in the loss."""
    ema: Fraction | None = None
    """It follows the student: after each optimizer step its weights are ``ema`` times what they were and ``1 - ema``
    times the student's; null: it is frozen."""

    @property
    def knows_extended(self) -> bool:
        """Whether it knows item tokens."""
        return self.vocabulary != "base"

    @property
    def is_stitched(self) -> bool:
        """Whether the base teacher decides among the ids that both know."""
        return self.vocabulary == STITCHED

    def matches(self, source: str, has_extended: bool) -> bool:
        """Whether it scores rows of a source whose prompt holds item tokens, or holds none."""
        if self.prompts != ANY and has_extended != (self.prompts == WITH_ITEMS):
            return False
        return any(fnmatchcase(source, pattern) for pattern in self.sources)


@section("algorithm.distill")
class DistillConfig:
    """Objective of on-policy distillation."""

    objective: Literal["sampled", "exact", "forward_kl", "jsd", "topk"] = "sampled"
    """``sampled``: the advantage of the drawn token, by policy gradient. ``exact``: the whole reverse KL at every
    trained position, differentiated directly; likewise ``forward_kl``, and ``jsd`` with ``beta``. ``topk``:
    the reverse KL over the teacher's ``topk`` likeliest ids, for teachers that return no more."""
    topk: Count = 64
    """Likeliest ids of the teacher at each position that ``topk`` compares; all others it knows count as one."""
    beta: OpenFraction = 0.5
    """Share of the teacher in the mixture of ``jsd``: near 0 like the forward KL, near 1 like the reverse KL, with
    a small gradient in both limits."""
    support: Literal["full", "shared"] = "full"
    """``full``: the student's distribution over all its ids. ``shared``: over the ids that the teacher knows, so that
    the mass on item tokens neither counts nor moves."""
    leak_coef: NonNegativeFloat = 0.0
    """Weight of the term that keeps the student's mass on item tokens at ``leak_target``; needs a divergence
    objective."""
    leak_target: OpenFraction = 1e-4
    """Mass on item tokens that is aimed at."""
    coef: NonNegativeFloat | None = None
    """Weight of distillation beside a task reward, where ``algorithm.adv_estimator`` is another than
    ``on_policy_distill``: with ``sampled`` the advantages are added token by token, with a divergence objective the
    losses. null or 0: none."""
    teachers: Annotated[dict[str, TeacherConfig], NullIsEmpty] = field(default_factory=dict)
    """Further teachers by name. A row belongs to the first of them that its source and its prompt match, else to the
    teacher of ``actor_rollout_ref.ref``."""

    def __post_init__(self) -> None:
        self._check_unused()
        knows_extended = [teacher.knows_extended for teacher in self.teachers.values()]
        if taken := {*RESERVED_ROLES} & {*self.teachers}:
            raise ValueError(f"algorithm.distill.teachers.{taken.pop()}: that name is taken; choose another")
        if knows_extended != sorted(knows_extended, reverse=True):
            raise ValueError(
                f"algorithm.distill.teachers={list(self.teachers)}: list those with vocabulary=base last, for it "
                "decides which prompts may hold item tokens"
            )
        # No rows are known yet, so this finds only what patterns for all sources decide.
        self.check_base_settings([(ANY_SOURCE, True), (ANY_SOURCE, False)])

    def _check_unused(self) -> None:
        """Settings of an objective or a term that is not used must be at their defaults."""
        # Otherwise a setting that is left over from another objective looks as if it did something.
        whole, objective = self.is_divergence, self.objective
        used: dict[str, tuple[object, str]] = {
            "support": (whole, "objective=exact"),
            "leak_coef": (whole, "objective=exact"),
            "leak_target": (self.leak_coef, "leak_coef above 0"),
            "topk": (objective == TOPK, "objective=topk"),
            "beta": (objective == JSD, "objective=jsd"),
        }
        settings = [(name, *values, *used[name]) for name, values in schema.changed(self, *used).items()]
        for name, teacher in self.teachers.items():
            for key, values in schema.changed(teacher, "weight").items():
                settings.append((f"teachers.{name}.{key}", *values, whole or self.coef, "objective=exact"))
        for name, value, default, is_used, fix in settings:
            if not is_used:
                raise ValueError(
                    f"algorithm.distill.{name}={value} has no effect with algorithm.distill.objective={objective}; set "
                    f"algorithm.distill.{fix}, or leave it at {default}"
                )

    def check_base_settings(self, kinds: Iterable[tuple[str, bool]]) -> None:
        """Check that settings for rows whose teacher lacks item tokens have such rows.

        Args:
            kinds: source of each kind of row, and whether its prompt holds item tokens.

        Raises:
            ValueError: such a setting, and teachers that know item tokens score all rows.
        """
        if not all(self.teacher_knows_extended(source, has_extended) for source, has_extended in kinds):
            return
        for name, (value, default) in schema.changed(self, "support", "leak_coef").items():
            raise ValueError(
                f"algorithm.distill.{name}={value} has no effect: it is for teachers without item tokens, and "
                f"algorithm.distill.teachers gives all rows to {list(self.teachers)}, which know them; leave it at "
                f"{default}, or narrow their sources"
            )

    @property
    def is_divergence(self) -> bool:
        """Whether distributions are compared, rather than the drawn tokens."""
        return self.objective != SAMPLED

    @property
    def has_policy_loss(self) -> bool:
        """Whether the update follows an advantage; a divergence without a task reward beside it does not."""
        return not self.is_divergence or bool(self.coef)

    @property
    def topk_or_none(self) -> int | None:
        """How many likeliest ids the teachers return before the update; None: none."""
        return self.topk if self.objective == TOPK else None

    @property
    def needs_full_distribution(self) -> bool:
        """Whether the update needs the teachers' whole distributions."""
        return self.is_divergence and self.objective != TOPK

    @property
    def roles(self) -> list[str]:
        """All teachers, the one of ``actor_rollout_ref.ref`` first; a row's ``teacher`` is an index into this list."""
        return [BASE_TEACHER, *self.teachers]

    def teacher_of(self, source: str, has_extended: bool = False) -> int:
        """Index of the teacher of the rows of a source whose prompt holds item tokens, or holds none."""
        teachers = enumerate(self.teachers.values(), 1)
        return next((index for index, teacher in teachers if teacher.matches(source, has_extended)), 0)

    @property
    def routes_by_prompt(self) -> bool:
        """Whether a row's teacher depends on what its prompt holds."""
        return any(teacher.prompts != ANY for teacher in self.teachers.values())

    @property
    def extended_sources(self) -> list[str]:
        """Patterns of the sources whose prompts may hold item tokens, as the teacher of such prompts knows them."""
        # Teachers that know them come first in the list, so none of the others takes such a row from them.
        readers = [t for t in self.teachers.values() if t.knows_extended and t.prompts != WITHOUT_ITEMS]
        return [pattern for teacher in readers for pattern in teacher.sources]

    def weight_of(self, role: str) -> float:
        """Weight of a teacher's rows in the loss."""
        return 1.0 if role == BASE_TEACHER else self.teachers[role].weight

    def knows_extended(self, role: str) -> bool:
        """Whether a teacher knows item tokens by its settings; see ``PPOConfig.knows_extended`` for ``ref``."""
        return role != BASE_TEACHER and self.teachers[role].knows_extended

    def teacher_knows_extended(self, source: str, has_extended: bool = False) -> bool:
        """Whether the teacher of such rows knows item tokens."""
        return self.knows_extended(self.roles[self.teacher_of(source, has_extended)])


@section("algorithm.kl_ctrl")
class KLControlConfig:
    """Weight of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """Whether the weight stays, or moves so that the KL stays near ``target_kl``."""
    kl_coef: float = 0.001
    """Weight, or the weight to start from."""
    horizon: Count = 10000
    """Answers, not training steps, over which the adaptive weight moves."""
    target_kl: PositiveFloat = 0.1
    """KL that the adaptive weight steers to."""


@section("algorithm.rollout_correction")
class RolloutCorrectionConfig:
    """Importance weights from the sampler's distribution to the policy's."""

    rollout_is: Literal["token"] | None = None
    """``token``: weight each token by p_policy / p_sampler; null: none (and a warning where the two differ)."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Largest weight."""


@section("algorithm")
class AlgoConfig:
    """How advantages are computed."""

    adv_estimator: str = "grpo"
    """A name in ``core_algos.ADV_ESTIMATOR_REGISTRY``: ``on_policy_distill``, ``grpo``, ``rloo``,
    ``reinforce_plus_plus``, ``reinforce_plus_plus_baseline`` or one registered there, which learns from a reward."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """For estimators with a value function."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide GRPO advantages by the group's standard deviation."""
    use_kl_in_reward: bool = False
    """Subtract a KL penalty to the reference from the token rewards; not with ``on_policy_distill``, which has none.
    Where ``distill.coef`` is set, a row's reference is its teacher."""
    kl_penalty: KLEstimator = "kl"
    """Estimator of that penalty: ``kl`` (k1), ``abs``, ``mse`` (k2) or ``low_var_kl`` (k3)."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    distill_adv_max_clip: float | None = None
    """Upper bound of the distillation advantage; 0 is a bound, null is none."""
    distill_adv_min_clip: float | None = None
    """Lower bound of the distillation advantage; 0 is a bound, null is none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    def __post_init__(self) -> None:
        low, high = self.distill_adv_min_clip, self.distill_adv_max_clip
        if low is not None and high is not None and low > high:
            raise ValueError(f"algorithm.distill_adv_min_clip={low} is above distill_adv_max_clip={high}; swap them")

    @property
    def distils(self) -> bool:
        """Whether a teacher is learned from, alone or beside a task reward."""
        return self.adv_estimator == AdvantageEstimator.ON_POLICY_DISTILL or bool(self.distill.coef)

    @property
    def learns_from_reward(self) -> bool:
        """Whether advantages are made from a task reward, alone or beside a teacher."""
        return self.adv_estimator != AdvantageEstimator.ON_POLICY_DISTILL

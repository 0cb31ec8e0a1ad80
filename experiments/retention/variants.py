"""What is compared: objectives, which teacher scores what, learning rates, protection. Data, no code of its own.

A variant is a name, what it is called in the table, Hydra overrides over `COMMON`, the prompts of the recommender that
are rehearsed beside the general ones, and where no setting does it, a change of the training step (`tweaks`). Add a
line to try another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from recipe.onpolicy_distill.quickstart import distillation

Settings = Mapping[str, str | float | bool]
"""Hydra keys and values."""

TEACHER, BEFORE = "teacher", "before"
"""Not variants: what teacher and student can do before anything is distilled."""

NONE, HISTORIES, ITEMS, CODES = "none", "histories", "items", "codes"
"""Prompts that are rehearsed: none, real ones, the same made of random items of the catalogue, or of random codes."""
REHEARSAL_SHARE = 0.25
"""Of each batch, where any are rehearsed."""

END_TOKEN = "<end token>"
"""Stands for the id of the teacher's end token, which differs between worlds."""

COMMON: Settings = {
    "actor_rollout_ref.actor.optim.lr": 5e-4,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
    "data.train_batch_size": 64,
}
"""The same for all: constant learning rate, so that a run may end at any step."""

EXACT: Settings = {"algorithm.distill.objective": "exact", "algorithm.distill.support": "shared"}
LEAK: Settings = {"algorithm.distill.leak_coef": 1.0}
SELF: Settings = {"++algorithm.distill.teachers.self": "{vocabulary:full,sources:[rec_*]}"}
STITCHED: Settings = {"++algorithm.distill.teachers.stitched": "{vocabulary:stitched,sources:[rec_*]}"}
LOW_RATE: Settings = {"actor_rollout_ref.actor.optim.lr": 2e-4}
FROZEN_ROWS: Settings = {"actor_rollout_ref.actor.freeze_extended_rows": True}
SHORT: Settings = {"actor_rollout_ref.rollout.horizon": 6}
BAD_SHARES = (0.02, 0.1, 0.6)
"""Of rehearsal, from which a steered share has to find its way."""
WEIGHTS = (3, 10)
"""Of a rehearsed token beside a general one."""
TEACHER_SHARES = (0.25, 0.5, 0.75)
"""Of the average that a run begins at."""
KEEP: Settings = {"trainer.keep": "val/rec_*/reward >= 0.9 of step 0"}
PUBLIC_FORK: Settings = {
    "actor_rollout_ref.rollout.mask_after_extend_token": False,
    "actor_rollout_ref.ref.ref_replace_token_id": END_TOKEN,
}
_SETTINGS = yaml.safe_load(distillation.SETTINGS.read_text(encoding="utf-8"))
QUICKSTART: Settings = {
    # The study has processes, folders and loggers of its own.
    **{key: value for key, value in _SETTINGS.items() if not key.startswith("trainer.")},
    **distillation.SETTINGS_OF_EXACT,
    "actor_rollout_ref.actor.optim.lr": distillation.LEARNING_RATES[distillation.EXACT],
}
"""What ``make quickstart`` does, but for its length."""


def share_of(rehearsal: float) -> Settings:
    """The mixture with a share of rehearsal."""
    return {"data.source_weights": f"{{rec_*:{rehearsal},general_*:{1 - rehearsal}}}"}


@dataclass(frozen=True)
class Variant:
    """One way to distil."""

    label: str
    """In tables and plots."""
    settings: Settings = field(default_factory=dict)
    """Over `COMMON`."""
    rehearsal: str = NONE
    """Which prompts of the recommender are mixed in."""
    tweak: str | None = None
    """A key of `tweaks.TWEAKS`."""
    teacher_share: float = 0.0
    """What is distilled is the student averaged with the teacher, of which this is the share. The frozen student stays
    the one before."""

    @property
    def all_settings(self) -> dict[str, str | float | bool]:
        """What decides a run's outcome besides its seeds and its length; results are kept with it."""
        own = {"tweak": self.tweak, "teacher_share": self.teacher_share}
        used = {key: value for key, value in own.items() if value}  # results without them have no such keys
        return {**COMMON, **self.settings, "rehearsal": self.rehearsal, **used}


VARIANTS: dict[str, Variant] = {
    "public-fork": Variant("public fork: no mask, end token", PUBLIC_FORK),
    "sampled": Variant("sampled, masked"),
    "sampled-low-lr": Variant("sampled, lr 2e-4", LOW_RATE),
    "exact": Variant("exact, shared support", EXACT),
    "exact-leak": Variant("exact + leak term", {**EXACT, **LEAK}),
    "exact-low-lr": Variant("exact, lr 2e-4", {**EXACT, **LOW_RATE}),
    "exact-frozen": Variant("exact, frozen item rows", {**EXACT, **FROZEN_ROWS}),
    "exact-leak-frozen": Variant("exact + leak, frozen item rows", {**EXACT, **LEAK, **FROZEN_ROWS}),
    "sampled-self": Variant("sampled + self, histories", SELF, HISTORIES),
    "exact-self": Variant("exact + self, histories", {**EXACT, **SELF}, HISTORIES),
    "exact-self-items": Variant("exact + self, random items", {**EXACT, **SELF}, ITEMS),
    "exact-self-codes": Variant("exact + self, random codes", {**EXACT, **SELF}, CODES),
    "exact-leak-self": Variant("exact + leak + self, histories", {**EXACT, **LEAK, **SELF}, HISTORIES),
    "quickstart": Variant("the quickstart's default", QUICKSTART, HISTORIES),
    "exact-self-low-lr": Variant("exact + self, histories, lr 2e-4", {**EXACT, **SELF, **LOW_RATE}, HISTORIES),
    "exact-self-frozen": Variant("exact + self, frozen item rows", {**EXACT, **SELF, **FROZEN_ROWS}, HISTORIES),
    "stitched": Variant("exact + stitched, histories", {**EXACT, **STITCHED}, HISTORIES),
    **{
        f"exact-self-{name}-{share:.0%}".rstrip("%"): Variant(
            f"exact + self, {label} {share}", {**EXACT, **SELF, **settings, **share_of(share)}, HISTORIES
        )
        for name, label, settings in (("share", "share", {}), ("keep", "steered from share", KEEP))
        for share in BAD_SHARES
    },
    **{
        f"exact-self-weight-{weight}": Variant(
            f"exact + self, weight {weight}",
            {**EXACT, "++algorithm.distill.teachers.self": f"{{vocabulary:full,sources:[rec_*],weight:{weight}}}"},
            HISTORIES,
        )
        for weight in WEIGHTS
    },
    **{
        f"averaged-{share:.0%}".rstrip("%"): Variant(
            f"exact + self, begun at an average with {share:.0%} teacher",
            {**EXACT, **SELF},
            HISTORIES,
            teacher_share=share,
        )
        for share in TEACHER_SHARES
    },
    **{
        tweak: Variant(label, {**EXACT, **SELF}, HISTORIES, tweak)
        for tweak, label in {
            "items-forward": "exact + self, forward KL on items",
            "items-jsd": "exact + self, JSD on items",
            "alternate": "exact + self, batches alternate",
            "tokens-half": "exact + self, half of general tokens",
            "tokens-half-even": "exact + self, half of general tokens, even",
            "uncertain-forward": "exact + self, forward KL where uncertain",
            "prompt-positions": "exact + self, prompts' positions too",
        }.items()
    },
    "leak-penalty": Variant("sampled, advantage -1 at an item token", tweak="leak-penalty"),
    "horizon-6": Variant("exact + self, answers of 6 tokens", {**EXACT, **SELF, **SHORT}, HISTORIES),
}
"""In the order of the table."""

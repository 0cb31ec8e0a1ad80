"""The quickstart's distillation: the normal entry point, in a process of its own.

In: a world, teacher, student, and what the user asked for. Out: the run's folder with ``metrics.jsonl`` and a few
checkpoints. Settings are those of a real run but for their size.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipe.onpolicy_distill.quickstart.child import run_child

if TYPE_CHECKING:
    from recipe.onpolicy_distill.quickstart.world import World

MAX_PROMPT_TOKENS = 64
MAX_ANSWER_TOKENS = 12
MASKED, PUBLIC_FORK = "masked", "public-fork"
MODES = (MASKED, PUBLIC_FORK)
"""``masked`` trains on nothing after an answer's first item token. ``public-fork`` does as the public fork of verl: it
trains on that too, while the teacher reads an end token in place of each item token."""
EXACT, SAMPLED = "exact", "sampled"
OBJECTIVES = (EXACT, SAMPLED)
"""``exact``: the whole reverse KL to the teacher on general prompts, and to the student as it was, frozen, on
recommendation prompts. ``sampled``: the original method, drawn tokens on general prompts."""
SHARES = {"rec_next": 0.2, "rec_caption": 0.15, "general_*": 0.65}
"""Of a batch, by source: each family of recommendation prompts has its own, for what is not rehearsed is forgotten."""
SELF_WEIGHT = 10
"""Of the tokens that the frozen student scores. At 1 general tokens, far from their teacher, decide the first steps,
and what those break is mended late."""
REAL, ITEMS, CODES = "real", "items", "codes"
REHEARSALS = (REAL, ITEMS, CODES)
"""Recommendation prompts of the objective exact: those that the student learned from, or such prompts with random items
of the catalogue, or with random codes, in place of histories."""
SYNTHETIC_PROMPTS = 4000
SETTINGS_OF_EXACT: dict[str, str | float | bool] = {
    "algorithm.distill.objective": "exact",
    "algorithm.distill.support": "shared",
    "algorithm.distill.leak_coef": 0.3,
    "++algorithm.distill.teachers.self": f"{{vocabulary:full,sources:[rec_*],weight:{SELF_WEIGHT}}}",
    "data.source_weights": "{" + ",".join(f"{source}:{share}" for source, share in SHARES.items()) + "}",
}
LEARNING_RATES = {EXACT: 4.5e-4, SAMPLED: 1e-3}
STEPS = {EXACT: 175, SAMPLED: 200}
"""Steps that an objective needs here."""
EXACT_MATCH = Path(__file__).with_name("exact_match.py")
SETTINGS = Path(__file__).with_name("distillation.yaml")
COMMAND = "command.sh"
"""A file of the run's folder, by which the quickstart knows it as its own."""


@dataclass(frozen=True)
class Distillation:
    """What is distilled, and how."""

    world: "World"
    teacher: Path
    student: Path
    folder: Path
    """Where the run writes; emptied before it starts."""
    steps: int
    seed: int
    objective: str = EXACT
    """One of OBJECTIVES."""
    mode: str = MASKED
    """One of MODES."""
    rehearsal: str = REAL
    """One of REHEARSALS; the objective sampled has none."""
    overrides: Sequence[str] = ()
    """The user's Hydra overrides."""

    def run(self) -> None:
        """Train; raises RuntimeError where the run fails."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / COMMAND).write_text(f"{shlex.join(command := self.command())}\n", encoding="utf-8")
        # The entry point decides for itself how the threads of its many processes wait.
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        if code := run_child(command, environment):
            raise RuntimeError(f"the distillation ended with code {code}; its own first error is above")

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and Hugging Face folders of the students that were kept, oldest first."""
        found = self.folder.glob("global_step_*/actor/huggingface")
        return sorted((int(path.parent.parent.name.removeprefix("global_step_")), path) for path in found)

    def command(self) -> list[str]:
        """The entry point with the quickstart's settings, then the user's."""
        import torch  # here, for --help does without it

        world = self.world
        settings = {
            **yaml.safe_load(SETTINGS.read_text(encoding="utf-8")),
            "actor_rollout_ref.model.path": self.student,
            "actor_rollout_ref.ref.model.path": self.teacher,
            "actor_rollout_ref.actor.optim.lr": LEARNING_RATES[self.objective],
            "actor_rollout_ref.rollout.extend_vocab_start_token": world.extend_vocab_start_token,
            "actor_rollout_ref.rollout.seed": self.seed,
            "data.val_files": _listed(world.general_test, world.rec_test),
            "data.max_prompt_length": MAX_PROMPT_TOKENS,
            "data.max_response_length": MAX_ANSWER_TOKENS,
            "data.seed": self.seed,
            "custom_reward_function.path": EXACT_MATCH,
            "trainer.n_gpus_per_node": min(2, torch.cuda.device_count()) or 2,
            "trainer.total_training_steps": self.steps,
            "trainer.test_freq": max(1, self.steps // 8),
            "trainer.save_freq": max(1, (self.steps + 1) // 2),
            "trainer.default_local_dir": self.folder,
            "trainer.rollout_data_dir": self.folder / "rollouts",
            "trainer.validation_data_dir": self.folder / "answers",
            **self._settings_of_objective(),
            **self._settings_of_mode(),
        }
        command = [sys.executable, "-m", "recipe.onpolicy_distill.main_onpolicy_distill"]
        return [*command, *(f"{key}={value}" for key, value in settings.items()), *self.overrides]

    def _settings_of_objective(self) -> dict[str, Any]:
        """Recommendation prompts that are made have the sources and the form of the world's."""
        from recipe.onpolicy_distill.quickstart.world import WorldConfig

        world, key = self.world, "data.synthetic_item_prompts"
        if self.objective == SAMPLED:
            return {"data.train_files": world.general_train}
        if self.rehearsal == REAL:
            return {**SETTINGS_OF_EXACT, "data.train_files": _listed(world.general_train, world.rec_train)}
        return {
            **SETTINGS_OF_EXACT,
            "data.train_files": world.general_train,
            f"{key}.count": SYNTHETIC_PROMPTS,
            f"{key}.catalogue": world.catalogue if self.rehearsal == ITEMS else "null",
            f"++{key}.templates": "{next:{user:'history: {history}'},caption:{user:'caption: {item}'}}",
            f"{key}.min_history": WorldConfig.history,
            f"{key}.max_history": WorldConfig.history,
            f"{key}.source": "rec",
            f"{key}.seed": self.seed,
        }

    def _settings_of_mode(self) -> dict[str, Any]:
        if self.mode == MASKED:
            return {}
        from verl.utils.tokenizer import hf_tokenizer

        return {
            "actor_rollout_ref.rollout.mask_after_extend_token": False,
            "actor_rollout_ref.ref.ref_replace_token_id": hf_tokenizer(self.world.teacher_tokenizer).eos_token_id,
        }


def _listed(*files: Path) -> str:
    """A list for Hydra, quoted: a folder's name may hold what its grammar has a use for."""
    return json.dumps([*map(str, files)])

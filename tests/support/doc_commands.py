"""Commands that a page of the documentation shows, and the settings that they give a run."""

import re
import shlex
from pathlib import Path

from support.script_runner import MODELS, read_back, run
from support.tiny_pairs import REPO
from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config

RECIPE = ("recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
PROGRAMS = {
    "examples.tiny": RECIPE,
    "recipe.onpolicy_distill.main_onpolicy_distill": RECIPE,
    "verl.trainer.main_ppo": ("verl.trainer.config", "ppo_trainer"),
}
"""Modules that train, each with the folder and the name of its settings."""

COMMAND = re.compile(r" {4}(?:[A-Z_]+=\S* )*(?:python -m|bash|export|vllm|lm_eval|pip) ")
"""How a line begins that a shell reads."""


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page's indented blocks; comments are left out."""
    text = (REPO / page).read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if COMMAND.match(line)]


def after_variables(words: list[str]) -> list[str]:
    """A command without the variables that are set for it."""
    return words[1:] and after_variables(words[1:]) if words and words[0].partition("=")[0].isupper() else words


def module_of(words: list[str]) -> str | None:
    """The module that a command runs."""
    return words[2] if words[:2] == ["python", "-m"] else None


def settings_of(words: list[str], folder: Path) -> PPOConfig | None:
    """The settings of a command that trains, read as it would; None of any other.

    Args:
        folder: where hostfiles of the command lie.
    """
    command = after_variables(words)
    if command[0] == "bash" and "distill" in command[1]:
        variables = dict(word.split("=", 1) for word in words[: len(words) - len(command)])
        done = run(REPO / command[1], *command[2:], cwd=folder, DRY_RUN=1, **MODELS | variables)
        assert done.returncode == 0, done.stderr
        command = read_back(done.stdout)
        command[0] = "python"
    module = module_of(command)
    if module not in PROGRAMS:
        return None
    overrides = command[3:]
    if module == "examples.tiny":
        from examples.tiny import settings  # torch comes with it

        overrides = [*settings(Path("outputs/tiny")), *overrides]
    return load_config(overrides, *PROGRAMS[module])

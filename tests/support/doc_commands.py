"""Commands that a page of the documentation shows, and the settings that they give a run."""

import re
import shlex
from pathlib import Path

from recipe.onpolicy_distill.cli import COMMANDS
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

COMMAND = re.compile(r" {4}(?:[A-Z_]+=\S* +)*(?:python -m|kai-verl|bash|export|vllm|lm_eval|pip) ")
"""How a line begins that a shell reads."""


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page's indented blocks, arrays put in; comments are left out."""
    text = (REPO / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for name, words in re.findall(r"^ {4}([A-Z]+)=\((.*?)\)$", text, re.MULTILINE | re.DOTALL):
        text = text.replace(f'"${{{name}[@]}}"', words.replace("\n", " "))
    return [shlex.split(line, comments=True) for line in text.splitlines() if COMMAND.match(line)]


def after_variables(words: list[str]) -> list[str]:
    """A command without the variables that are set for it."""
    return words[1:] and after_variables(words[1:]) if words and words[0].partition("=")[0].isupper() else words


def module_of(words: list[str]) -> str | None:
    """The module that a command runs."""
    if words[0] == "kai-verl":
        return COMMANDS[words[1]].module
    return words[2] if words[:2] == ["python", "-m"] else None


def variables_of(words: list[str]) -> dict[str, str]:
    """The variables that a command sets: for itself, or as ``export`` for those after it."""
    command = after_variables(words)
    pairs = command[1:] if command[0] == "export" else words[: len(words) - len(command)]
    return dict(pair.split("=", 1) for pair in pairs)


def trainings(page: str, folder: Path) -> list[PPOConfig]:
    """The settings of each command of a page that trains, read as it would.

    Args:
        folder: where hostfiles of the commands lie.
    """
    exported, found = MODELS, []
    for words in commands(page):
        command = after_variables(words)
        if command[0] == "export":
            exported = exported | variables_of(words)
        if command[0] == "bash" and "distill" in command[1]:
            env = {"DRY_RUN": "1", **exported, **variables_of(words)}
            done = run(REPO / command[1], *command[2:], cwd=folder, **env)
            assert done.returncode == 0, done.stderr
            command = ["python", *read_back(done.stdout)[1:]]
        if (module := module_of(command)) in PROGRAMS:
            overrides = command[2 if command[0] == "kai-verl" else 3 :]
            if module == "examples.tiny":
                from examples.tiny import settings  # torch comes with it

                overrides = [*settings(Path("outputs/tiny")), *overrides]
            found.append(load_config(overrides, *PROGRAMS[module]))
    return found

"""The same prompts, answered by every model, to read.

In: folders of `judge`. Out: Markdown, a prompt a section, a model a line.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random

PROMPT_CHARACTERS, ANSWER_CHARACTERS = 400, 300
"""What is longer is cut."""


def side_by_side(judged: Mapping[str, Path], seed: int, count: int = 20) -> str:
    """Answers of IFEval's prompts, ``count`` of them chosen by ``seed``.

    Args:
        judged: by the model's name.
    """
    answers = {model: _answers(folder) for model, folder in judged.items()}
    prompts = sorted(set.intersection(*map(set, answers.values())))
    sections = []
    for number, prompt in enumerate(Random(seed).sample(prompts, min(count, len(prompts))), 1):
        lines = [f"| {model} | {_cell(answers[model][prompt], ANSWER_CHARACTERS)} |" for model in judged]
        asked = _cell(prompt, PROMPT_CHARACTERS)
        sections.append("\n".join([f"**{number}.** {asked}", "", "| | answer |", "|---|---|", *lines]))
    return "\n\n".join(sections) + "\n"


def _answers(folder: Path) -> dict[str, str]:
    """By prompt."""
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # no splitlines: for texts
    asked = (json.loads(line) for line in lines)
    return {line["prompt"]: line["answer"] for line in asked if line["source"] == "ifeval"}


def _cell(text: str, characters: int) -> str:
    """A text as one line of a table that shows it as it is."""
    cut = text if len(text) <= characters else f"{text[:characters]} …"
    cut = re.sub(r"([|*_`#\[\]\\])", r"\\\1", cut.replace("&", "&amp;").replace("<", "&lt;"))
    return "<br>".join(line.strip() for line in cut.splitlines()) or "(nothing)"

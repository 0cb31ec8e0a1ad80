"""A teacher and a student whose vocabulary extends the teacher's, made as a user would make them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pair:
    """A teacher and a student whose vocabulary extends the teacher's."""

    teacher: Path
    student: Path
    extend_vocab_start_token: int


def make_pair(teacher_tokenizer: Path, student_tokenizer: Path, out: Path, *options: str) -> Pair:
    """Run ``recipe.onpolicy_distill.tiny_models`` as a user would."""
    command = [sys.executable, "-m", "recipe.onpolicy_distill.tiny_models"]
    command += ["--teacher-tokenizer", str(teacher_tokenizer), "--student-tokenizer", str(student_tokenizer)]
    subprocess.run([*command, "--out", str(out), *options], cwd=REPO, check=True, timeout=300)
    tokenizer = json.loads((teacher_tokenizer / "tokenizer.json").read_text())
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return Pair(out / "teacher", out / "student", max(ids) + 1)

"""The project stays small: files of at most 400 lines, functions of fewer than 60, and a budget for each part."""

import ast
import json

import pytest
from support.tiny_pairs import REPO

from scripts import code_size

FOLDERS = ("verl", "recipe", "experiments", "examples", "benchmarks", "scripts", "tests")
FILES = sorted(path for top in FOLDERS for path in (REPO / top).rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
BUDGETS = {"verl": 12990, "recipe": 2750, "tests": 19100}
"""Code lines of each part; a new capability, or a gap in the tests, may raise its part's in the change that adds it."""
MAX_MODULES = 114
"""Of ``verl/``."""


def too_long(text: str) -> list[str]:
    """Which limits a source exceeds."""
    lines = len(text.splitlines())
    found = [f"{lines} lines; at most {MAX_LINES}"] if lines > MAX_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= MAX_FUNCTION_LINES:
                found.append(f"{node.name} has {length} lines; fewer than {MAX_FUNCTION_LINES}")
    return found


def test_each_part_keeps_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    code_size.main()
    sizes = json.loads(capsys.readouterr().out.splitlines()[-1])
    over = {part: size for part, size in sizes.items() if size["code_lines"] > BUDGETS.get(part, 1e9)}
    assert not over
    assert 50 < sizes["verl"]["modules"] <= MAX_MODULES


def test_files_and_functions_are_short() -> None:
    assert len(FILES) > 200, "too few files to mean anything"
    wrong = {str(path.relative_to(REPO)): found for path in FILES if (found := too_long(path.read_text("utf-8")))}
    assert not wrong


def test_what_counts_as_long() -> None:
    assert too_long("x = 1\n" * 400) == too_long("def f():\n" + "    x = 1\n" * 58) == []
    assert too_long("x = 1\n" * 401) == ["401 lines; at most 400"]
    assert too_long("async def f():\n" + "    x = 1\n" * 59) == ["f has 60 lines; fewer than 60"]

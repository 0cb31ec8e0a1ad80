#!/usr/bin/env python3
"""Code lines and modules of each part of the project, as a table and then as one line of JSON.

Counted are lines that hold code: no blank lines, comments or docstrings. A module is a file with code.

    python scripts/code_size.py
"""

import ast
import io
import json
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PARTS = ("verl", "recipe", "tests", "experiments", "benchmarks", "scripts")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of a source that hold code."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            # A text that stands alone documents what is around it: a docstring, or the one below a field.
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                texts.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


def measure(part: str) -> dict[str, int]:
    """Code lines and modules below a folder."""
    counts = [code_lines(path.read_text(encoding="utf-8")) for path in (REPO / part).rglob("*.py")]
    return {"code_lines": sum(counts), "modules": sum(count > 0 for count in counts)}


def main() -> None:
    """Print the table."""
    sizes = {part: measure(part) for part in PARTS}
    print(f"{'':12} {'code lines':>10} {'modules':>8}")
    for part, size in sizes.items():
        print(f"{part:12} {size['code_lines']:>10,} {size['modules']:>8}")
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()

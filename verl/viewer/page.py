"""Makes the page of a run.

In:  a run as `run_data` reads it. Out: HTML with its styles, its script and its data inside; it loads nothing.
"""

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from verl.viewer.run_data import Run, pack

HERE = Path(__file__).parent


def page_of(run: Run) -> str:
    """The page as text; opens from a file or a server."""
    name = run.folder.absolute().name
    about = {"folder": str(run.folder.absolute()), "notes": run.notes}
    blobs = {"about": about, "curves": run.curves, "answers": _columns(run.answers)}
    packed = {part: pack(json.dumps(blob, allow_nan=False).encode()) for part, blob in blobs.items()} | run.tokens
    # Base64 has nothing that HTML reads as markup, whatever a run's texts hold.
    data = [f'<script type="text/plain" id="data-{escape(part)}">{text}</script>' for part, text in packed.items()]
    return Template(_source("html")).substitute(
        title=escape(name), style=_source("css"), script=_source("js"), data="\n".join(data)
    )


def _source(kind: str) -> str:
    return (HERE / f"page.{kind}").read_text(encoding="utf-8")


def _columns(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Answers by column; prompts, which come back every few steps, by their place in ``prompts``."""
    columns: dict[str, list[Any]] = {name: [row[name] for row in answers] for name in (answers[0] if answers else ())}
    places: dict[str | None, int] = {}
    columns["prompt"] = [places.setdefault(row["prompt"], len(places)) for row in answers]
    return columns | {"prompts": list(places)}

"""Does distillation beat what costs no training? General ability against recommendation, on one scoreboard.

::

    python -m experiments.retention.pareto [--student-seeds 0,1,2] [--steps 150]

In:  the quickstart's teachers and students. Out: ``OUT/pareto.jsonl`` (a line per model), ``pareto.md`` and
``pareto.svg``. Measured are the student before, a run of each variant in `TRAINED`, and weighted sums of weights
(``recipe.onpolicy_distill.combine_models``)::

    before-teacher   (1 - w) before + w teacher          what a team would try first
    after-before     (1 - w) after + w before            after: distilled on general prompts alone
    after-vector     after + w (before - teacher)        task arithmetic: what recommending taught, once more
    after-rows       after, with the rows of item tokens of before

What ``pareto.jsonl`` has of the same settings is not made again. The quickstart's run is as long as the quickstart.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.retention.__main__ import listed
from experiments.retention.results import Record, Run, append_result, read_lines
from experiments.retention.runner import scoreboard, train
from experiments.retention.table import KEPT, Spread
from experiments.retention.worlds import Prepared, prepare
from recipe.onpolicy_distill.combine_models import combine_models
from recipe.onpolicy_distill.quickstart.cache import key_digest
from recipe.onpolicy_distill.quickstart.distillation import EXACT, STEPS

WORLD, GENERAL_ONLY, QUICKSTART = "quickstart", "exact", "quickstart"
TRAINED = {
    GENERAL_ONLY: "distilled on general prompts",
    "exact-self": "distilled, with rehearsal",
    QUICKSTART: "the quickstart's default",
}
"""Variants that are trained, and their labels."""
BEFORE, TEACHER, AFTER = "before", "teacher", "after"
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
FAMILIES = {
    BEFORE: "before",
    "before-teacher": "before and teacher, averaged",
    "after-before": "after and before, averaged",
    "after-vector": "after + recommending vector",
    "after-rows": "after, item rows restored",
    **TRAINED,
}
"""Labels, in the order of the table."""
GENERAL = "general, of the teacher's"
SHOWN = {
    "R@1 kept": "recall_1_kept",
    "R@5 kept": "recall_5_kept",
    "free kept": "free_kept",
    "captions kept": "text_kept",
}
"""Columns of the table, and their names in `KEPT`."""


@dataclass(frozen=True)
class WeightedSum:
    """A model that costs no training."""

    family: str
    share: float
    parts: Mapping[str, float]
    """Coefficient by BEFORE, TEACHER and AFTER."""
    rows_from: str | None = None


def weighted_sums() -> Iterator[WeightedSum]:
    """All that are measured."""
    for share in SHARES:
        yield WeightedSum("before-teacher", share, {BEFORE: 1 - share, TEACHER: share})
        yield WeightedSum("after-before", share, {AFTER: 1 - share, BEFORE: share})
        yield WeightedSum("after-vector", share, {AFTER: 1.0, BEFORE: share, TEACHER: -share})
    yield WeightedSum("after-rows", 1.0, {AFTER: 1.0}, rows_from=BEFORE)


def runs_of(student_seed: int, steps: int) -> list[Run]:
    """A run of each variant in `TRAINED`."""
    own_length = {QUICKSTART: STEPS[EXACT]}
    return [Run(WORLD, student_seed, name, 0, own_length.get(name, steps)) for name in TRAINED]


def made_with(steps: int) -> dict[str, Any]:
    """What a line of ``pareto.jsonl`` says of how it was made, so that those of other settings do not count."""
    return {"steps": steps, "settings": key_digest([(run.budget, run.settings) for run in runs_of(0, steps)])}


def measure(out: Path, student_seed: int, steps: int) -> None:
    """Append to ``pareto.jsonl`` what it lacks of one student."""
    identity = {"student_seed": student_seed, **made_with(steps)}
    lines = [line for line in read_lines(out / "pareto.jsonl") if identity.items() <= line.items()]
    have = {(line["family"], line["share"]) for line in lines}
    prepared = prepare(WORLD, student_seed, out / "cache")

    def record(family: str, share: float, model: Path) -> None:
        if (family, share) not in have:
            metrics = scoreboard(prepared, model, rec=family != TEACHER)
            append_result(out / "pareto.jsonl", {**identity, "family": family, "share": share, "metrics": metrics})

    after = {run.variant: trained(out, prepared, run) for run in runs_of(student_seed, steps)}
    for family, model in {TEACHER: prepared.teacher, BEFORE: prepared.student, **after}.items():
        record(family, 1.0, model)
    models = {BEFORE: prepared.student, TEACHER: prepared.teacher, AFTER: after[GENERAL_ONLY]}
    sums = [mix for mix in weighted_sums() if (mix.family, mix.share) not in have]
    for mix in tqdm(sums, desc=f"student {student_seed}", unit="model", disable=None):
        folder = out / "mixed"
        shutil.rmtree(folder, ignore_errors=True)
        parts = {models[name]: coefficient for name, coefficient in mix.parts.items()}
        rows_from = models[mix.rows_from] if mix.rows_from else None
        combine_models(parts, folder, prepared.world.extend_vocab_start_token, rows_from)
        record(mix.family, mix.share, folder)


def trained(out: Path, prepared: Prepared, run: Run) -> Path:
    """The model of a run, trained where it is not there."""
    folder = out / "pareto_runs" / f"{run.name}-{key_digest(run.settings)}"
    model = folder / f"global_step_{run.steps}" / "actor" / "huggingface"
    if not model.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        train(run, prepared, folder, out / "cache" / "data")
    return model


# ------------------------------------------------------------------ table and picture


def summarise(lines: Sequence[Record]) -> dict[tuple[str, float], dict[str, Spread]]:
    """By family and share: what came back and what was kept, over students."""
    starts = {(line["student_seed"], line["family"]): line["metrics"] for line in lines if line["share"] == 1.0}
    values: dict[tuple[str, float], dict[str, list[float]]] = {}
    for line in lines:
        if line["family"] == TEACHER:
            continue
        student, metrics = line["student_seed"], line["metrics"]
        before, teacher = starts[student, BEFORE], starts[student, TEACHER]
        shares = {GENERAL: metrics["general_accuracy"] / teacher["general_accuracy"]}
        shares |= {name: metrics[KEPT[key]] / before[KEPT[key]] for name, key in SHOWN.items() if before.get(KEPT[key])}
        of_model = values.setdefault((line["family"], line["share"]), {})
        for name, share in shares.items():
            of_model.setdefault(name, []).append(share)
    order = {family: place for place, family in enumerate(FAMILIES)}
    keys = sorted(values, key=lambda key: (order[key[0]], key[1]))
    return {key: {name: Spread.of(shares) for name, shares in values[key].items()} for key in keys}


def table_text(summaries: Mapping[tuple[str, float], Mapping[str, Spread]]) -> str:
    """Markdown; means and sample standard deviations over students."""
    names = [GENERAL, *SHOWN]
    lines = [f"| model | w | {' | '.join(names)} |", f"|{' --- |' * (2 + len(names))}"]
    for (family, share), spreads in summaries.items():
        cells = []
        for name in names:
            spread = spreads.get(name)
            deviation = "" if spread is None or spread.deviation is None else f" ± {spread.deviation:.0%}"
            cells.append("–" if spread is None else f"{spread.mean:.0%}{deviation}")
        weight = f"{share:g}" if any(other != share for own, other in summaries if own == family) else ""
        lines.append(f"| {FAMILIES[family]} | {weight} | {' | '.join(cells)} |")
    return "\n".join(lines)


WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 760, 460, 60, 20, 50, 250
COLOURS = ("#555", "#1f77b4", "#2ca02c", "#e8a33d", "#9467bd", "#8c564b", "#17becf", "#d62728")
STYLE = "text{font:12px system-ui,sans-serif;fill:#222}.mid{text-anchor:middle}.end{text-anchor:end}"


def picture(summaries: Mapping[tuple[str, float], Mapping[str, Spread]], kept: str = "R@5 kept") -> str:
    """SVG: general ability to the right, what is kept of recommendation upwards; a line per family, over w."""

    def place(general: float, recall: float) -> tuple[float, float]:
        x = LEFT + min(max(general, 0.0), 1.1) / 1.1 * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - min(max(recall, 0.0), 1.1) / 1.1 * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, low), (_, high), (left, y), (right, _) = place(tick, 0), place(tick, 1.1), place(0, tick), place(1.1, tick)
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{left:.1f} {y:.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{low + 18:.1f}">{tick:.0%}</text>')
        parts.append(f'<text class="end" x="{left - 8:.1f}" y="{y + 4:.1f}">{tick:.0%}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle:.0f}" y="{HEIGHT - 12}">general ability, of the teacher\'s</text>')
    parts.append(f'<text x="{LEFT}" y="14">{kept}</text>')
    for number, (family, label) in enumerate(FAMILIES.items()):
        colour = COLOURS[number]
        dots = [place(s[GENERAL].mean, s[kept].mean) for (own, _), s in summaries.items() if own == family]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dots)}" fill="none" stroke="{colour}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>' for x, y in dots]
        y = TOP + 20 * (number + 1)
        parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y}">{escape(label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.retention.pareto", description=description)
    parser.add_argument("--student-seeds", type=partial(listed, int), default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--steps", type=int, default=150, help="of the runs but the quickstart's; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("outputs/retention"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, then table and picture."""
    args = parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for student_seed in args.student_seeds:
        measure(out, student_seed, args.steps)
    wanted = made_with(args.steps)
    lines = [line for line in read_lines(out / "pareto.jsonl") if wanted.items() <= line.items()]
    summaries = summarise([line for line in lines if line["student_seed"] in args.student_seeds])
    text = table_text(summaries)
    (out / "pareto.md").write_text(text + "\n", encoding="utf-8")
    (out / "pareto.svg").write_text(picture(summaries) + "\n", encoding="utf-8")
    print(f"{text}\n\ntable: {out / 'pareto.md'}\npicture: {out / 'pareto.svg'}")


if __name__ == "__main__":
    main()

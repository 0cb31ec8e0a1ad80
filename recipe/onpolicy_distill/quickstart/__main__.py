"""Forget, recover, and see what it cost.

::

    python -m recipe.onpolicy_distill.quickstart [--seed 0] [--objective exact] [--out DIR] [OVERRIDES...]

    world ─► teacher ─► student, which forgot ─► scoreboard ─► distillation ─► scoreboard ─► report

World, teacher and student are kept in OUT/cache and made again only where what they depend on has changed. The
distillation is the normal entry point, in a process of its own; Hydra overrides go to it.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipe.onpolicy_distill.quickstart.distillation import (
    COMMAND,
    EXACT,
    MASKED,
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    MODES,
    OBJECTIVES,
    REAL,
    REHEARSALS,
    SAMPLED,
    STEPS,
    Distillation,
)
from verl.utils.console import command_parser
from verl.utils.timing import marked_timer

PHASES = 6
OWN_KEYS = (
    *("trainer.default_local_dir", "trainer.save_freq", "trainer.check_only", "trainer.val_only"),
    "actor_rollout_ref.actor.checkpoint.save_contents",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; Hydra overrides may stand anywhere in it."""
    parser = command_parser("recipe.onpolicy_distill.quickstart", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of world, models and sampling; default: %(default)s")
    parser.add_argument("--steps", type=int, help=f"of distillation; default: {STEPS[EXACT]}, sampled {STEPS[SAMPLED]}")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="exact: whole distributions, with recommendation prompts scored by the student as it was (default); "
        "sampled: the original method, drawn tokens of general prompts alone",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MASKED,
        help="masked: nothing after an answer's first item token is trained on (default); public-fork: all of it is, "
        "and the teacher reads an end token in place of item tokens, as in the public fork of verl; takes the "
        "objective sampled",
    )
    parser.add_argument(
        "--rehearsal",
        choices=REHEARSALS,
        default=REAL,
        help="recommendation prompts of the objective exact: real: what the student learned from (default); items: "
        "random items of the catalogue; codes: random codes, with no recommendation data at all",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the distillation")
    args = parser.parse_intermixed_args(argv)
    if args.mode != MASKED and args.objective == EXACT:
        parser.error(f"--mode {args.mode} has no meaning with --objective {EXACT}, which masks by itself")
    args.objective = args.objective or (EXACT if args.mode == MASKED else SAMPLED)
    if args.rehearsal != REAL and args.objective == SAMPLED:
        parser.error(f"--rehearsal {args.rehearsal} has no meaning with the objective {SAMPLED}, which has none")
    args.steps = STEPS[args.objective] if args.steps is None else args.steps
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    if taken := [text for text in args.overrides if text.lstrip("+").startswith(OWN_KEYS)]:
        parser.error(f"{' '.join(taken)}: the quickstart finds its checkpoints by these; leave them as they are")
    return args


class Phases:
    """Announces each phase, and keeps what it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"\n[{len(self.seconds) + 1}/{PHASES}] {what}", flush=True)
        with marked_timer(name, self.seconds):
            yield


def experiment(args: argparse.Namespace, out: Path) -> Path:
    """Everything from the world to the report; returns the report. Raises RuntimeError where the distillation fails."""
    from recipe.onpolicy_distill.quickstart import models, report, scoreboard, world

    cache, seed = out / "cache", args.seed
    chosen = {key: getattr(args, key) for key in ("seed", "steps", "objective", "mode", "rehearsal", "overrides")}
    method = args.objective if args.mode == MASKED else args.mode
    method = method if args.rehearsal == REAL else f"{method}-{args.rehearsal}"
    results = out if method == EXACT else out / method
    if any(results.glob("run/*")) and not (results / "run" / COMMAND).is_file():
        raise ValueError(f"{results / 'run'}, which a new run replaces, holds something else; name another --out")
    asked = {"max_prompt_length": MAX_PROMPT_TOKENS, "max_new_tokens": MAX_ANSWER_TOKENS, "seed": seed}
    asked["rollout"] = {"cpu_kvcache_space_gb": 0.25}
    phase, total = Phases(), dict[str, float]()
    with marked_timer("total", total):
        with phase("world", "a world: general tasks, a catalogue, users"):
            built = world.build(cache, world.WorldConfig(seed=seed))
        with phase("teacher", "a teacher learns the general tasks"):
            teacher = models.make_teacher(built, cache, models.TeacherConfig(seed=seed))
        with phase("student", "a student, the teacher with item tokens, learns to recommend and forgets them"):
            student = models.make_student(built, teacher, cache, models.StudentConfig(seed=seed))
        with phase("scoreboard_before", "what teacher and student can do"):
            of_teacher = scoreboard.score(built, teacher, teacher, rec=False, **asked)
            before = scoreboard.score(built, student, teacher, **asked)
        run = Distillation(world=built, teacher=teacher, student=student, folder=results / "run", **chosen)
        with phase("distillation", f"{args.steps} steps of on-policy distillation ({method})"):
            run.run()
        with phase("scoreboard_after", "what the student can do now, and could half-way"):
            *earlier, (last, trained) = run.checkpoints()
            half_way = {
                step: scoreboard.score(built, model, teacher, general=False, **asked).metrics for step, model in earlier
            }
            after = scoreboard.score(built, trained, teacher, **asked)
    summary = {
        **chosen,
        "steps": last,
        "seconds": phase.seconds | total,
        "popularity": scoreboard.popularity_metrics(built),
        "teacher": of_teacher.metrics,
        "before": before.metrics,
        "half_way": half_way,
        "after": after.metrics,
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    samples = report.pair_samples(before.samples, after.samples)
    page = report.write_report(results / "report.html", summary, run.folder / "metrics.jsonl", samples)
    print(f"\n{scoreboard.comparison_table(summary)}")
    print(f"\n{scoreboard.popularity_line(summary)}\n{total['total']:.0f} s")
    return page


def main(argv: list[str] | None = None) -> None:
    """Run the experiment and say where the report is."""
    args = parse_args(argv)
    # Read when torch is loaded. Threads that spin for long while they wait make a machine that does other things crawl,
    # and threads that do not spin at all take half as long again on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recipe").setLevel(logging.INFO)
    out = args.out.resolve()
    try:
        page = experiment(args, out)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    run = page.parent / "run"
    print(f"report: {page}\nmetrics: {page.with_name('summary.json')}\nthe student: {run}")
    print(f"every answer, token by token: kai-verl view {run}")


if __name__ == "__main__":
    main()

"""A real chat model learns to recommend from real purchases, forgets how to chat, and is distilled back.

::

    python -m experiments.real_model [--small | --tiny] [--seed 0] [--out DIR] [--until STEP] [OVERRIDES...]

    teacher ─► prompts, data ─► student, which forgot ─► judged ─► distilled ─► judged ─► result.md, result.json

What is done is found in OUT and not done again; Hydra overrides go to the distillation.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.real_model.table import AFTER, BEFORE, TEACHER, compare, markdown
from verl.utils.timing import marked_timer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STEPS = ("teacher", "prompts", "data", "student", f"judge_{TEACHER}", f"judge_{BEFORE}", "distil", f"judge_{AFTER}")
SECONDS = "seconds.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; Hydra overrides may stand anywhere in it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_model", description=str(__doc__).splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_const", const="small", dest="size", help="in some minutes on a CPU")
    sizes.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="a random model in place of the real one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, models and sampling; default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: outputs/real_model, with the size's name behind it")
    parser.add_argument("--data", type=Path, default=DATA, help="purchases and IFEval's prompts; default: %(default)s")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="last step to make; default: all")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="on the CPU; default: where it multiplies in it (AMX)"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the distillation")
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or Path("outputs") / "-".join(filter(None, ("real_model", args.size)))
    return args


class Steps:
    """Makes the steps in order up to one of them, and keeps what each took, over all calls of the command."""

    def __init__(self, out: Path, last: str) -> None:
        self._path, self._last = out / SECONDS, last
        self.seconds: dict[str, float] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def __call__(self, name: str, make: Callable[[], Path]) -> Path:
        """The folder that ``make`` leaves; ends the program behind the last step that is wanted."""
        print(f"[{STEPS.index(name) + 1}/{len(STEPS)}] {name}", flush=True)
        try:
            with marked_timer(name, self.seconds):
                folder = make()
        finally:
            self._path.write_text(json.dumps(self.seconds, indent=1) + "\n", encoding="utf-8")
        if name == self._last and name != STEPS[-1]:
            print(f"made up to {name}; the same command without --until goes on")
            raise SystemExit(0)
        return folder


def experiment(args: argparse.Namespace, out: Path) -> str:
    """Every step, then ``result.md`` and ``result.json``; returns the table. Errors as those of the steps."""
    from experiments.real_model import data, distil, ifeval, judge, models, prompts, student
    from experiments.real_model.sizes import sizes_of

    size, step, shared = sizes_of(args.size, args.seed, args.bf16), Steps(out, args.until), args.data
    if ifeval.read_prompts(shared):
        ifeval.verifier()  # whether it is installed, before anything is made
    else:
        logging.getLogger("experiments").info("no IFEval prompts in %s: it is left out", shared)
    teacher = step("teacher", lambda: models.make_teacher(out, tiny=args.size == "tiny"))
    general = step("prompts", lambda: prompts.make_prompts(teacher, out, size.prompts))
    files = step("data", lambda: data.build(out, size.data, shared)), general
    before = step("student", lambda: student.make_student(teacher, files[0], out, size.student))

    def judged(name: str, model: Path) -> Any:
        folder = step(f"judge_{name}", lambda: judge.judge(model, teacher, files, shared, out, size.judge))
        return json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))

    outcomes = {TEACHER: judged(TEACHER, teacher), BEFORE: judged(BEFORE, before)}
    after = step("distil", lambda: distil.distil(teacher, before, files, out, size.distil, args.overrides))
    outcomes[AFTER] = judged(AFTER, after)
    return write_result(out, args, outcomes, step.seconds)


def write_result(out: Path, args: argparse.Namespace, outcomes: dict[str, Any], seconds: dict[str, float]) -> str:
    """Write the table as Markdown and JSON; returns it."""
    rows = compare(outcomes)
    popular = {key: sum(x for x, _ in pairs) / len(pairs) for key, pairs in outcomes[AFTER].items() if "popular" in key}
    asked = {"size": args.size or "full", "seed": args.seed, "overrides": args.overrides}
    result = {**asked, "rows": rows, "popular": popular, "seconds": seconds}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    of_popular = ", ".join(f"Recall@{key.rpartition('_')[2]} {value:.3f}" for key, value in popular.items())
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    text = f"{markdown(rows)}\n\nThe most purchased items for everyone: {of_popular}.\nSeconds: {took}.\n"
    (out / "result.md").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the experiment and show the table."""
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("recipe", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        print(experiment(args, out))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
